// Compiled with -mavx2 -mfma.
#define RF_ISA avx2
#define RF_LANES 8
#include "conv_bn_act/winograd_kernel.h"
