/* bf16 for CPUs with AVX-512: kept so, multiplied in fp32, which some that have AVX512-BF16 do twice as fast. */
#define LANES 16
#define BF16 1
#define HALF 0
#define PAIRED 0
#define ROWS 14
#include "native.h"
