// Compiled with -mavx512f.
#define RF_ISA avx512
#define RF_LANES 16
#include "conv_bn_act/winograd_kernel.h"
