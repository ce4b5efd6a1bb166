/* bf16 for CPUs with AVX512-FP16: weights in fp16, multiplied so, twice as many an instruction as in fp32. */
#define LANES 16
#define BF16 1
#define HALF 1
#define PAIRED 0
#define ROWS 14
#include "native.h"
