// Integer arithmetic and bit-field instructions (PTX ISA 9.7.1, 9.7.2).
#include <algorithm>

#include "ops.h"

namespace ptxsim {
namespace {

template <class T>
using U = std::make_unsigned_t<T>;
template <class T>
struct Wide;
template <>
struct Wide<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wide<int16_t> {
  using type = int32_t;
};
template <>
struct Wide<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wide<int32_t> {
  using type = int64_t;
};
template <>
struct Wide<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wide<int64_t> {
  using type = __int128;
};
template <class T>
using W = typename Wide<T>::type;

// Wrap-around arithmetic is done unsigned; the casts keep 16-bit promotion out of signed overflow.
TYPED(T, Add, (T a, T b), (T)((U<T>)a + (U<T>)b));
TYPED(T, Sub, (T a, T b), (T)((U<T>)a - (U<T>)b));
TYPED(T, MulLo, (T a, T b), (T)((uint64_t)a * (uint64_t)b));
TYPED(T, MulHi, (T a, T b), (T)(((W<T>)a * (W<T>)b) >> (8 * sizeof(T))));
TYPED(W<T>, MulWide, (T a, T b), ((W<T>)a * (W<T>)b));
TYPED(T, MadLo, (T a, T b, T c), (T)((uint64_t)a * (uint64_t)b + (uint64_t)c));
TYPED(T, MadHi, (T a, T b, T c), Add<T>()(MulHi<T>()(a, b), c));
TYPED(W<T>, MadWide, (T a, T b, W<T> c), (W<T>)((U<W<T>>)((W<T>)a * (W<T>)b) + (U<W<T>>)c));
// Division by zero gives an unspecified value; all ones is what the hardware's sequence gives.
TYPED(T, Div, (T a, T b), b == 0 ? (T)-1 : (std::is_signed<T>::value && b == (T)-1) ? (T)(0 - (U<T>)a) : (T)(a / b));
TYPED(T, Rem, (T a, T b), b == 0 ? a : (std::is_signed<T>::value && b == (T)-1) ? (T)0 : (T)(a % b));
TYPED(T, Min, (T a, T b), std::min(a, b));
TYPED(T, Max, (T a, T b), std::max(a, b));
TYPED(T, MinRelu, (T a, T b), std::max<T>(0, std::min(a, b)));
TYPED(T, MaxRelu, (T a, T b), std::max<T>(0, std::max(a, b)));
TYPED(T, Abs, (T a), a < 0 ? (T)(0 - (U<T>)a) : a);
TYPED(T, Neg, (T a), (T)(0 - (U<T>)a));
TYPED(T, Sad, (T a, T b, T c), (T)((U<T>)c + (U<T>)(a < b ? (U<T>)b - (U<T>)a : (U<T>)a - (U<T>)b)));
LANE(int32_t, AddSat, (int32_t a, int32_t b), (int32_t)std::clamp<int64_t>((int64_t)a + b, INT32_MIN, INT32_MAX));
LANE(int32_t, SubSat, (int32_t a, int32_t b), (int32_t)std::clamp<int64_t>((int64_t)a - b, INT32_MIN, INT32_MAX));
LANE(int32_t, MadHiSat, (int32_t a, int32_t b, int32_t c),
     (int32_t)std::clamp<int64_t>(((int64_t)a * b >> 32) + c, INT32_MIN, INT32_MAX));
template <class T, template <class> class F>
struct Pair16 {  // two 16-bit halves
  uint32_t operator()(uint32_t a, uint32_t b) const {
    F<T> f;
    return (uint32_t)(uint16_t)f((T)a, (T)b) | (uint32_t)(uint16_t)f((T)(a >> 16), (T)(b >> 16)) << 16;
  }
};
TYPED(uint32_t, Popc, (T a), (uint32_t)__builtin_popcountll(a));
LANE(uint32_t, Clz32, (uint32_t a), a ? (uint32_t)__builtin_clz(a) : 32);
LANE(uint32_t, Clz64, (uint64_t a), a ? (uint32_t)__builtin_clzll(a) : 64);
template <class T>
struct Bfind {
  uint32_t operator()(const Inst& in, T a) const {
    U<T> v = (U<T>)(std::is_signed<T>::value && a < 0 ? ~a : a);
    if (v == 0) return kAll;
    uint32_t pos = 63u - (uint32_t)__builtin_clzll((uint64_t)v);
    return in.x[0] ? 8 * sizeof(T) - 1 - pos : pos;
  }
};
template <class T>
struct Brev {
  T operator()(T a) const {
    T r = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) r = (T)(r << 1 | ((a >> i) & 1));
    return r;
  }
};
template <class T>
struct Bfe {
  T operator()(T a, uint32_t b, uint32_t c) const {
    const unsigned bits = 8 * sizeof(T), pos = b & 0xff, len = c & 0xff;
    if (len == 0) return 0;
    const unsigned msb = std::min(pos + len, bits) - 1;
    bool sign = std::is_signed<T>::value && ((U<T>)a >> std::min(msb, bits - 1)) & 1;
    U<T> r = pos >= bits ? 0 : (U<T>)((U<T>)a >> pos);
    unsigned got = pos >= bits ? 0 : std::min(len, bits - pos);
    if (got < bits) {
      U<T> keep = (U<T>)(((U<T>)1 << got) - 1);
      r = (U<T>)((r & keep) | (sign ? (U<T>)~keep : 0));
    }
    return (T)r;
  }
};
template <class T>
struct Bfi {
  T operator()(T a, T b, uint32_t c, uint32_t d) const {
    const unsigned bits = 8 * sizeof(T), pos = c & 0xff, len = d & 0xff;
    if (len == 0 || pos >= bits) return b;
    unsigned n = std::min(len, bits - pos);
    T keep = (T)((n >= bits ? ~(T)0 : (T)(((T)1 << n) - 1)) << pos);
    return (T)((b & ~keep) | ((T)(a << pos) & keep));
  }
};
template <class T>
void bfi(Warp& w, const Inst& in, uint32_t m) {
  T r[kLanes];
  Ref dref = in.ext->refs[0];
  for (unsigned i = 0; i < kLanes; ++i)
    r[i] = Bfi<T>()(w.ptr<T>(in.a)[i], w.ptr<T>(in.b)[i], lane32(w, in.c, i), lane32(w, dref, i));
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c) & w.validOf(dref));
}
template <class T>
struct Szext {
  T operator()(const Inst& in, T a, uint32_t n) const {
    if (in.x[0]) n &= 31;
    if (n >= 32) return a;
    if (n == 0) return 0;
    uint32_t u = (uint32_t)a << (32 - n);
    return std::is_signed<T>::value ? (T)((int32_t)u >> (32 - n)) : (T)(u >> (32 - n));
  }
};
struct Bmsk {
  uint32_t operator()(const Inst& in, uint32_t a, uint32_t b) const {
    if (in.x[0]) a &= 31, b &= 31;
    if (a >= 32 || b == 0) return 0;
    uint32_t n = std::min(b, 32u);
    return (n == 32 ? kAll : (1u << n) - 1) << a;
  }
};
struct Fns {  // position of the n-th set bit, counted from bit `base` upwards (n > 0) or downwards (n < 0)
  uint32_t operator()(uint32_t mask, uint32_t base, int32_t n) const {
    if (base > 31) return kAll;
    if (n == 0) return (mask >> base) & 1 ? base : kAll;
    int step = n > 0 ? 1 : -1, left = n > 0 ? n : -n;
    for (int i = (int)base; i >= 0 && i < 32; i += step)
      if ((mask >> i) & 1 && --left == 0) return (uint32_t)i;
    return kAll;
  }
};
template <class A, class B>
struct Dp4a {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const {
    uint32_t s = (uint32_t)c;
    for (int i = 0; i < 4; ++i) s += (uint32_t)((int32_t)(A)(a >> (8 * i)) * (int32_t)(B)(b >> (8 * i)));
    return (int32_t)s;
  }
};
template <class A, class B, int Hi>
struct Dp2a {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const {
    uint32_t s = (uint32_t)c;
    for (int i = 0; i < 2; ++i) s += (uint32_t)((int32_t)(A)(a >> (16 * i)) * (int32_t)(B)(b >> (8 * i + 16 * Hi)));
    return (int32_t)s;
  }
};

// ---- extended precision: the carry flag lives per lane in Warp::carry
template <class T, int Kind>  // 0 add, 1 sub; x[0] carry in, x[1] carry out
void addWithCarry(Warp& w, const Inst& in, uint32_t m) {
  T r[kLanes];
  uint32_t carry = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    T a = w.ptr<T>(in.a)[i], b = w.ptr<T>(in.b)[i];
    unsigned cin = in.x[0] ? (w.carry >> i) & 1 : 0;
    unsigned __int128 wide = Kind == 0 ? (unsigned __int128)a + b + cin : (unsigned __int128)a - b - cin;
    r[i] = (T)wide;
    carry |= (uint32_t)((wide >> (8 * sizeof(T))) & 1) << i;
  }
  storeLanes(w, in.d, r, m);
  if (in.x[1]) w.carry = (w.carry & ~m) | (carry & m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b));
}
template <class T>
void madWithCarry(Warp& w, const Inst& in, uint32_t m) {  // x[2]: hi
  T r[kLanes];
  uint32_t carry = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    T a = w.ptr<T>(in.a)[i], b = w.ptr<T>(in.b)[i], c = w.ptr<T>(in.c)[i];
    T p = in.x[2] ? MulHi<T>()(a, b) : MulLo<T>()(a, b);
    unsigned __int128 wide = (unsigned __int128)(U<T>)p + (U<T>)c + (in.x[0] ? (w.carry >> i) & 1 : 0);
    r[i] = (T)wide;
    carry |= (uint32_t)((wide >> (8 * sizeof(T))) & 1) << i;
  }
  storeLanes(w, in.d, r, m);
  if (in.x[1]) w.carry = (w.carry & ~m) | (carry & m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c));
}

#define BY_NARROW_TYPE(t, F)                 \
  ((t) == Type::U16   ? lanes<F<uint16_t>>() \
   : (t) == Type::S16 ? lanes<F<int16_t>>()  \
   : (t) == Type::U32 ? lanes<F<uint32_t>>() \
   : (t) == Type::S32 ? lanes<F<int32_t>>()  \
                      : nullptr)
Type asUnsigned(Type t) {
  return t == Type::B16 ? Type::U16 : t == Type::B32 ? Type::U32 : t == Type::B64 ? Type::U64 : t;
}
Type widened(Type t) {
  return t == Type::U16 ? Type::U32 : t == Type::S16 ? Type::S32 : t == Type::U32 ? Type::U64 : Type::S64;
}

void carryOp(Dec& d, int kind, bool cin, bool cout) {
  Type t = d.needType();
  d.out.x[0] = cin;
  d.out.x[1] = cout;
  setOperands(d, t, t, t);
  bool wide = typeBytes(t) == 8;
  d.out.fn = kind == 0 ? (wide ? (Handler)addWithCarry<uint64_t, 0> : (Handler)addWithCarry<uint32_t, 0>)
                       : (wide ? (Handler)addWithCarry<uint64_t, 1> : (Handler)addWithCarry<uint32_t, 1>);
}

}  // namespace

// Called by the families that share a mnemonic with floats (add, sub, mul, ...); false: not an integer type.
bool decodeIntegerArithmetic(Dec& d, const std::string& op) {
  Type t = Type::None;
  for (size_t i = 1; i < d.p.op.size() && t == Type::None; ++i) t = typeFromName(d.p.op[i]);
  if (isFloat(t) || t == Type::None) return false;
  if (op == "add" || op == "sub") {
    if (d.take("cc")) {
      carryOp(d, op == "sub", false, true);
      return true;
    }
    bool sat = d.take("sat");
    t = asUnsigned(d.needType());
    setOperands(d, t, t, t);
    if (sat) {
      if (t == Type::S32) d.out.fn = op == "add" ? lanes<AddSat>() : lanes<SubSat>();
    } else if (t == Type::U16x2 || t == Type::S16x2) {
      d.out.fn = op == "add" ? lanes<Pair16<uint16_t, Add>>() : lanes<Pair16<uint16_t, Sub>>();
    } else {
      d.out.fn = op == "add" ? BY_TYPE(t, Add) : BY_TYPE(t, Sub);
    }
    return true;
  }
  if (op == "min" || op == "max") {
    bool relu = d.take("relu"), lo = op == "min";
    t = d.needType();
    setOperands(d, t, t, t);
    if (relu) {
      if (t == Type::S32) d.out.fn = lo ? lanes<MinRelu<int32_t>>() : lanes<MaxRelu<int32_t>>();
      if (t == Type::S16x2) d.out.fn = lo ? lanes<Pair16<int16_t, MinRelu>>() : lanes<Pair16<int16_t, MaxRelu>>();
    } else if (t == Type::U16x2) {
      d.out.fn = lo ? lanes<Pair16<uint16_t, Min>>() : lanes<Pair16<uint16_t, Max>>();
    } else if (t == Type::S16x2) {
      d.out.fn = lo ? lanes<Pair16<int16_t, Min>>() : lanes<Pair16<int16_t, Max>>();
    } else {
      d.out.fn = lo ? BY_TYPE(t, Min) : BY_TYPE(t, Max);
    }
    return true;
  }
  if (op == "mul") {
    int kind = d.takeOneOf({"lo", "hi", "wide"});
    t = asUnsigned(d.needType());
    if (kind == 2) {
      setOperands(d, widened(t), t, t);
      d.out.fn = BY_NARROW_TYPE(t, MulWide);
    } else if (kind >= 0) {
      setOperands(d, t, t, t);
      d.out.fn = kind == 0 ? BY_TYPE(t, MulLo) : BY_TYPE(t, MulHi);
    }
    return true;
  }
  if (op == "mad") {
    int kind = d.takeOneOf({"lo", "hi", "wide"});
    bool cc = d.take("cc"), sat = d.take("sat");
    t = asUnsigned(d.needType());
    if (kind == 2) {
      setOperands(d, widened(t), t, t, widened(t));
      d.out.fn = BY_NARROW_TYPE(t, MadWide);
      return true;
    }
    setOperands(d, t, t, t, t);
    if (cc) {
      d.out.x[1] = 1;
      d.out.x[2] = kind == 1;
      d.out.fn = t == Type::U32   ? (Handler)madWithCarry<uint32_t>
                 : t == Type::S32 ? (Handler)madWithCarry<int32_t>
                 : t == Type::U64 ? (Handler)madWithCarry<uint64_t>
                                  : (Handler)madWithCarry<int64_t>;
    } else if (sat) {
      if (kind == 1 && t == Type::S32) d.out.fn = lanes<MadHiSat>();
    } else {
      d.out.fn = kind == 0 ? BY_TYPE(t, MadLo) : kind == 1 ? BY_TYPE(t, MadHi) : nullptr;
    }
    return true;
  }
  if (op == "div" || op == "rem") {
    t = d.needType();
    setOperands(d, t, t, t);
    d.out.fn = op == "div" ? BY_TYPE(t, Div) : BY_TYPE(t, Rem);
    return true;
  }
  if (op == "abs" || op == "neg") {
    t = d.needType();
    setOperands(d, t, t);
    if (op == "abs")
      d.out.fn = t == Type::S16   ? lanes<Abs<int16_t>>()
                 : t == Type::S32 ? lanes<Abs<int32_t>>()
                 : t == Type::S64 ? lanes<Abs<int64_t>>()
                                  : nullptr;
    else
      d.out.fn = BY_TYPE(t, Neg);
    return true;
  }
  return false;
}

void addIntegerOps(OpTable& t) {
  t["addc"] = [](Dec& d) { carryOp(d, 0, true, d.take("cc")); };
  t["subc"] = [](Dec& d) { carryOp(d, 1, true, d.take("cc")); };
  t["madc"] = [](Dec& d) {
    d.out.x[0] = 1;
    d.out.x[2] = d.takeOneOf({"lo", "hi"}) == 1;
    d.out.x[1] = d.take("cc");
    Type ty = d.needType();
    setOperands(d, ty, ty, ty, ty);
    d.out.fn = ty == Type::S32      ? (Handler)madWithCarry<int32_t>
               : ty == Type::S64    ? (Handler)madWithCarry<int64_t>
               : typeBytes(ty) == 4 ? (Handler)madWithCarry<uint32_t>
                                    : (Handler)madWithCarry<uint64_t>;
  };
  t["sad"] = [](Dec& d) {
    Type ty = d.needType();
    setOperands(d, ty, ty, ty, ty);
    d.out.fn = BY_TYPE(ty, Sad);
  };
  t["popc"] = [](Dec& d) {
    Type ty = d.needType();
    setOperands(d, Type::U32, ty);
    d.out.fn = BY_WIDTH(ty, Popc);
  };
  t["clz"] = [](Dec& d) {
    Type ty = d.needType();
    setOperands(d, Type::U32, ty);
    d.out.fn = typeBytes(ty) == 4 ? lanes<Clz32>() : lanes<Clz64>();
  };
  t["bfind"] = [](Dec& d) {
    d.out.x[0] = d.take("shiftamt");
    Type ty = d.needType();
    setOperands(d, Type::U32, ty);
    d.out.fn = BY_TYPE(ty, Bfind);
  };
  t["brev"] = [](Dec& d) {
    Type ty = d.needType();
    setOperands(d, ty, ty);
    d.out.fn = BY_WIDTH(ty, Brev);
  };
  t["bfe"] = [](Dec& d) {
    Type ty = d.needType();
    setOperands(d, ty, ty, Type::U32, Type::U32);
    d.out.fn = BY_TYPE(ty, Bfe);
  };
  t["bfi"] = [](Dec& d) {
    Type ty = d.needType();
    d.wantArgs(5, 5);
    d.out.d = d.dst(0, typeBytes(ty));
    d.out.a = d.src(1, ty);
    d.out.b = d.src(2, ty);
    d.out.c = d.src(3, Type::U32);
    d.extra()->refs = {d.src(4, Type::U32)};
    d.out.fn = typeBytes(ty) == 4 ? (Handler)bfi<uint32_t> : (Handler)bfi<uint64_t>;
  };
  t["szext"] = [](Dec& d) {
    d.out.x[0] = d.takeOneOf({"clamp", "wrap"}) == 1;
    Type ty = d.needType();
    setOperands(d, ty, ty, Type::U32);
    d.out.fn = ty == Type::S32 ? lanes<Szext<int32_t>>() : lanes<Szext<uint32_t>>();
  };
  t["bmsk"] = [](Dec& d) {
    d.out.x[0] = d.takeOneOf({"clamp", "wrap"}) == 1;
    d.needType();
    setOperands(d, Type::U32, Type::U32, Type::U32);
    d.out.fn = lanes<Bmsk>();
  };
  t["fns"] = [](Dec& d) {
    d.needType();
    setOperands(d, Type::U32, Type::U32, Type::U32, Type::S32);
    d.out.fn = lanes<Fns>();
  };
  t["dp4a"] = [](Dec& d) {
    Type a = d.needType(), b = d.needType();
    setOperands(d, Type::U32, Type::U32, Type::U32, Type::U32);
    bool sa = a == Type::S32, sb = b == Type::S32;
    d.out.fn = sa ? (sb ? lanes<Dp4a<int8_t, int8_t>>() : lanes<Dp4a<int8_t, uint8_t>>())
                  : (sb ? lanes<Dp4a<uint8_t, int8_t>>() : lanes<Dp4a<uint8_t, uint8_t>>());
  };
  t["dp2a"] = [](Dec& d) {
    bool hi = d.takeOneOf({"lo", "hi"}) == 1;
    Type a = d.needType(), b = d.needType();
    setOperands(d, Type::U32, Type::U32, Type::U32, Type::U32);
    if (a == Type::S32 && b == Type::S32)
      d.out.fn = hi ? lanes<Dp2a<int16_t, int8_t, 1>>() : lanes<Dp2a<int16_t, int8_t, 0>>();
    if (a == Type::U32 && b == Type::U32)
      d.out.fn = hi ? lanes<Dp2a<uint16_t, uint8_t, 1>>() : lanes<Dp2a<uint16_t, uint8_t, 0>>();
  };
}

}  // namespace ptxsim
