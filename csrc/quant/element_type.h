// Types of elements, shared by host and device.
#pragma once

namespace dsv3 {

enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace dsv3
