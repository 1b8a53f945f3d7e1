#define RF_ISA avx512bf16
#define RF_LANES 16
#define RF_BF16 1
#include "conv_bn_act/winograd_kernel.h"
