#define RF_ISA avx2
#define RF_LANES 8
#define RF_BF16 0
#include "conv_bn_act/winograd_kernel.h"
