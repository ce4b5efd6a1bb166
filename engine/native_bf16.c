/* bf16 for CPUs with AVX512-BF16: two products and sums a lane and instruction. */
#define LANES 16
#define BF16 1
#define HALF 0
#define PAIRED 1
#define ROWS 14
#include "native.h"
