/* fp32 for CPUs with AVX2, FMA and F16C: 8 numbers a register, 16 registers. */
#define LANES 8
#define BF16 0
#define HALF 0
#define PAIRED 0
#define ROWS 6
#include "native.h"
