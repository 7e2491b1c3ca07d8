// Templates for instructions that work lane by lane.
#pragma once
#include <tuple>

#include "decode.h"
#include "half.h"

namespace ptxsim {

template <class T>
inline void storeLanes(Warp& w, Ref d, const T* r, uint32_t m) {
  T* p = w.ptr<T>(d);
  if (m == kAll) {
    memcpy(p, r, sizeof(T) * kLanes);
  } else {
    for (unsigned i = 0; i < kLanes; ++i) p[i] = (m >> i) & 1 ? r[i] : p[i];
  }
}

// d = f(lane) in the lanes of m. `valid` counts when f is done.
template <class T, class F>
inline void setLanes(Warp& w, Ref d, uint32_t m, const uint32_t& valid, F f) {
  T r[kLanes];
  for (int i : lanesOf(m)) r[i] = (T)f(i);
  storeLanes(w, d, r, m);
  w.setValid(d, m, valid);
}

struct B128 {
  uint64_t v[2];
};
inline void nothing(Warp&, const Inst&, uint32_t) {}  // a handler

// A function of what one lane has, as a type: LANE(type, Name, (parameters)) { body }
#define LANE(type, name, parameters)  \
  struct name {                       \
    type operator() parameters const; \
  };                                  \
  inline type name::operator() parameters const
#define TYPED(type, name, parameters) \
  template <class T>                  \
  struct name {                       \
    type operator() parameters const; \
  };                                  \
  template <class T>                  \
  inline type name<T>::operator() parameters const

template <class F, class D, class... A, size_t... K>
inline void lanewiseFrom(Warp& w, const Inst& in, uint32_t m, std::index_sequence<K...>) {
  const Ref sources[] = {in.a, in.b, in.c, sizeof...(A) > 3 ? in.ext->refs[0] : Ref()};
  const std::tuple<const A*...> from{w.ptr<const A>(sources[K])...};
  const uint32_t valid = (w.validOf(sources[K]) & ...);
  auto f = [&](unsigned i) {
    if constexpr (std::is_invocable<F, const Warp&, const Inst&, A...>::value)
      return F()(w, in, std::get<K>(from)[i]...);
    else if constexpr (std::is_invocable<F, const Inst&, A...>::value)
      return F()(in, std::get<K>(from)[i]...);
    else
      return F()(std::get<K>(from)[i]...);
  };
  if constexpr (std::is_same<D, bool>::value) {
    uint32_t p = 0;
    for (unsigned i = 0; i < kLanes; ++i) p |= (uint32_t)f(i) << i;
    w.setPred(in.d, m, p, valid);
  } else {
    alignas(64) D r[kLanes];
    for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(i);
    storeLanes(w, in.d, r, m);
    w.setValid(in.d, m, valid);
  }
}
// d = f(a), f(a, b), ... in every lane (a fourth source is ext->refs[0]); f may ask for the instruction, or the warp
// and the instruction, first. A bool is a predicate. The result depends on every source, so that a lane is valid where
// all of them are.
template <class F, class D, class... A>
void lanewise(Warp& w, const Inst& in, uint32_t m) {
  lanewiseFrom<F, D, A...>(w, in, m, std::index_sequence_for<A...>());
}
// The same with the types of f's own parameters and result.
template <class F, class D, class... A>
constexpr Handler lanesOfTypes(D (F::*)(A...) const) {
  static_assert(sizeof(D) > 1 || std::is_same<D, bool>::value, "a register has at least two bytes");
  return lanewise<F, D, A...>;
}
template <class F, class D, class... A>
constexpr Handler lanesOfTypes(D (F::*)(const Inst&, A...) const) {
  return lanewise<F, D, A...>;
}
template <class F, class D, class... A>
constexpr Handler lanesOfTypes(D (F::*)(const Warp&, const Inst&, A...) const) {
  return lanewise<F, D, A...>;
}
template <class F>
constexpr Handler lanes() {
  return lanesOfTypes(&F::operator());
}

template <class T>
constexpr Type typeOf() {
  const int width = sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;
  if constexpr (std::is_floating_point<T>::value) return sizeof(T) == 4 ? Type::F32 : Type::F64;
  return (Type)((int)(std::is_signed<T>::value ? Type::S8 : Type::U8) + width);
}
inline Type bitsAsUnsigned(Type t) {
  return t >= Type::B8 && t <= Type::B64 ? (Type)((int)t - (int)Type::B8 + (int)Type::U8) : t;
}
// f(T()) for the one of the T that the type is, where bits count as unsigned, or that has this width; null if none is.
template <class... T, class F>
auto ofType(Type type, F f) {
  std::common_type_t<decltype(f(T()))...> r = 0;
  ((typeOf<T>() == bitsAsUnsigned(type) ? void(r = f(T())) : void()), ...);
  return r;
}
template <class F>
Handler ofWidth(unsigned bytes, F f) {
  return bytes == 2 ? f(uint16_t()) : bytes == 4 ? f(uint32_t()) : bytes == 8 ? f(uint64_t()) : nullptr;
}
// F<T> by the type of the instruction, of all of the integers unless some are named, or by its width.
template <template <class> class F, class... T>
void byType(Dec& d) {
  if constexpr (sizeof...(T) == 0)
    byType<F, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(d);
  else
    d.out.fn = ofType<T...>(d.types[0], [](auto t) { return lanes<F<decltype(t)>>(); });
}
template <template <class> class F>
void byWidth(Dec& d) {
  d.out.fn = ofWidth(typeBytes(d.types[0]), [](auto t) { return lanes<F<decltype(t)>>(); });
}

// handlerOf(flag, ...) with each flag as a type, std::true_type or std::false_type.
template <class F>
Handler byFlags(F handlerOf) {
  return handlerOf();
}
template <class F, class... Flags>
Handler byFlags(F handlerOf, bool flag, Flags... others) {
  auto with = [&](auto first) {
    return byFlags([&](auto... rest) -> Handler { return handlerOf(first, rest...); }, others...);
  };
  return flag ? with(std::true_type()) : with(std::false_type());
}

// One lane of a register of 2, 4 or 8 bytes.
inline uint64_t laneBits(Warp& w, Ref r, unsigned bytes, int lane) {
  return bytes == 2   ? w.ptr<const uint16_t>(r)[lane]
         : bytes == 4 ? w.ptr<const uint32_t>(r)[lane]
                      : w.ptr<const uint64_t>(r)[lane];
}
inline void setLaneBits(Warp& w, Ref r, unsigned bytes, int lane, uint64_t v) {
  if (bytes == 2)
    w.ptr<uint16_t>(r)[lane] = (uint16_t)v;
  else if (bytes == 4)
    w.ptr<uint32_t>(r)[lane] = (uint32_t)v;
  else
    w.ptr<uint64_t>(r)[lane] = v;
}
inline uint64_t laneAddress(Warp& w, const Inst& in, int lane) {  // in.a + in.imm; in.x[5] bytes of the register
  return laneBits(w, in.a, in.x[5], lane) + (uint64_t)in.imm;
}
inline uint32_t lane32(Warp& w, Ref r, unsigned lane) { return w.ptr<const uint32_t>(r)[lane]; }
inline uint64_t lane64(Warp& w, Ref r, unsigned lane) { return w.ptr<const uint64_t>(r)[lane]; }
// The same of an operand that must be defined.
inline uint32_t lane32(Warp& w, const Inst& in, Ref r, int lane, const char* role) {
  w.needValid(in, r, 1u << lane, role);
  return lane32(w, r, (unsigned)lane);
}
inline uint64_t laneAddress(Warp& w, const Inst& in, const AddressOperand& a, int lane) {
  w.needValid(in, a.ref, 1u << lane, "address");
  return laneBits(w, a.ref, a.bytes, lane) + (uint64_t)a.offset;
}
inline int firstLane(uint32_t m) { return __builtin_ctz(m); }
// Inst::imm points to what an instruction needs beyond an Extra.
template <class T>
inline T& own(Dec& d) {
  auto owned = std::make_shared<T>();
  d.kb.k.owned.push_back(owned);
  d.out.imm = (int64_t)owned.get();
  return *owned;
}
template <class T>
inline const T& owned(const Inst& in) {
  return *reinterpret_cast<const T*>(in.imm);
}

}  // namespace ptxsim
