#include "cuda/launch.h"

template struct sta::HeadDim<64>;
