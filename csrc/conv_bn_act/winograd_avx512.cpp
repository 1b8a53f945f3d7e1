#define RF_ISA avx512
#define RF_LANES 16
#define RF_BF16 0
#include "conv_bn_act/winograd_kernel.h"
