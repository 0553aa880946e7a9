// Vector operations with AMX, which adds products of tiles of bytes (csrc/int8/tiles.h) to AVX-512.
#pragma once
#include "avx512.h"
