// Templates for instructions that work lane by lane.
#pragma once
#include "decode.h"

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

// The results depend on every source, so a lane is valid where all sources are.
template <class D, class A, class F>
void op1(Warp& w, const Inst& in, uint32_t m) {
  const A* a = w.ptr<const A>(in.a);
  alignas(64) D r[kLanes];
  F f;
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(a[i]);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a));
}
template <class D, class A, class B, class F>
void op2(Warp& w, const Inst& in, uint32_t m) {
  const A* a = w.ptr<const A>(in.a);
  const B* b = w.ptr<const B>(in.b);
  alignas(64) D r[kLanes];
  F f;
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(a[i], b[i]);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b));
}
template <class D, class A, class B, class C, class F>
void op3(Warp& w, const Inst& in, uint32_t m) {
  const A* a = w.ptr<const A>(in.a);
  const B* b = w.ptr<const B>(in.b);
  const C* c = w.ptr<const C>(in.c);
  alignas(64) D r[kLanes];
  F f;
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(a[i], b[i], c[i]);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c));
}
// The same with access to the instruction's small constants.
template <class D, class A, class F>
void op1x(Warp& w, const Inst& in, uint32_t m) {
  const A* a = w.ptr<const A>(in.a);
  alignas(64) D r[kLanes];
  F f;
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(in, a[i]);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a));
}
template <class D, class A, class B, class F>
void op2x(Warp& w, const Inst& in, uint32_t m) {
  const A* a = w.ptr<const A>(in.a);
  const B* b = w.ptr<const B>(in.b);
  alignas(64) D r[kLanes];
  F f;
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(in, a[i], b[i]);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b));
}
template <class D, class A, class B, class C, class F>
void op3x(Warp& w, const Inst& in, uint32_t m) {
  const A* a = w.ptr<const A>(in.a);
  const B* b = w.ptr<const B>(in.b);
  const C* c = w.ptr<const C>(in.c);
  alignas(64) D r[kLanes];
  F f;
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (D)f(in, a[i], b[i], c[i]);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c));
}

inline void loadLanes(Warp& w, Ref r, unsigned bytes, uint64_t* out) {
  switch (bytes) {
    case 2:
      for (unsigned i = 0; i < kLanes; ++i) out[i] = w.ptr<const uint16_t>(r)[i];
      break;
    case 4:
      for (unsigned i = 0; i < kLanes; ++i) out[i] = w.ptr<const uint32_t>(r)[i];
      break;
    default:
      for (unsigned i = 0; i < kLanes; ++i) out[i] = w.ptr<const uint64_t>(r)[i];
      break;
  }
}
inline void putLanes(Warp& w, Ref d, unsigned bytes, const uint64_t* v, uint32_t m) {
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    if (bytes == 2)
      w.ptr<uint16_t>(d)[i] = (uint16_t)v[i];
    else if (bytes == 4)
      w.ptr<uint32_t>(d)[i] = (uint32_t)v[i];
    else
      w.ptr<uint64_t>(d)[i] = v[i];
  }
}
inline uint32_t lane32(Warp& w, Ref r, unsigned lane) {
  return w.ptr<const uint32_t>(r)[lane];
}
inline uint64_t lane64(Warp& w, Ref r, unsigned lane) {
  return w.ptr<const uint64_t>(r)[lane];
}
inline int firstLane(uint32_t m) {
  return __builtin_ctz(m);
}
template <class T, class U>
inline T bitsAs(U u) {
  static_assert(sizeof(T) == sizeof(U), "same size");
  T t;
  memcpy(&t, &u, sizeof t);
  return t;
}

// d = f(a), d = f(a, b) ... with widths from the type; F<T> is the functor.
inline void setOperands(Dec& d, Type dt, Type at) {
  d.wantArgs(2, 2);
  d.out.d = d.dst(0, std::max(2u, typeBytes(dt)));
  d.out.a = d.src(1, at);
}
inline void setOperands(Dec& d, Type dt, Type at, Type bt) {
  d.wantArgs(3, 3);
  d.out.d = d.dst(0, std::max(2u, typeBytes(dt)));
  d.out.a = d.src(1, at);
  d.out.b = d.src(2, bt);
}
inline void setOperands(Dec& d, Type dt, Type at, Type bt, Type ct) {
  d.wantArgs(4, 4);
  d.out.d = d.dst(0, std::max(2u, typeBytes(dt)));
  d.out.a = d.src(1, at);
  d.out.b = d.src(2, bt);
  d.out.c = d.src(3, ct);
}

}  // namespace ptxsim
