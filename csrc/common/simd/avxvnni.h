// Vector operations with AVX-VNNI, which adds products of bytes (csrc/int8/dot.h) to AVX2.
#pragma once
#include "avx2.h"
