// What every file includes, to be compiled once.
#include <algorithm>
#include <array>
#include <cmath>

#include "async.h"
#include "half.h"
