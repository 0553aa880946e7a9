// Vector operations with the dot product instructions of Armv8.2, which add products of bytes (csrc/int8/dot.h) to
// NEON.
#pragma once
#include "neon.h"
