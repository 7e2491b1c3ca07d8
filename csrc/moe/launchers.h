// Launchers of the moe family: raw pointers and sizes, elements unless said, strides included; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"
