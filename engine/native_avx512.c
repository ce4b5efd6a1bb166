/* fp32 for CPUs with AVX-512: 16 numbers a register, 32 registers. */
#define LANES 16
#define BF16 0
#define HALF 0
#define PAIRED 0
#define ROWS 14
#include "native.h"
