// Batch normalisation in training with the activation behind it, on the CPU, compiled once per instruction set. Bound by memory: the forward reads the map
// twice and writes it once, the backward reads the map and the gradient twice and writes one. The derivation is in vitkernels/ops/batch_norm/README.md.
#include "batch_norm/planes.h"
#include "batch_norm/rows.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

template <class S, Activation kActivation>
void forward_of(const Forward& a) { a.channels_last ? forward_rows<S, kActivation>(a) : forward_planes<S, kActivation>(a); }
template <class S, Activation kActivation>
void backward_of(const Backward& a) { a.channels_last ? backward_rows<S, kActivation>(a) : backward_planes<S, kActivation>(a); }

#define VITKERNELS_FOR_ACTIVATION(function)                                \
  switch (a.activation) {                                                  \
    case Activation::kNone: return function<S, Activation::kNone>(a);      \
    case Activation::kRelu: return function<S, Activation::kRelu>(a);      \
    case Activation::kSilu: return function<S, Activation::kSilu>(a);      \
  }

template <class S>
void forward(const Forward& a) { VITKERNELS_FOR_ACTIVATION(forward_of) }
template <class S>
void backward(const Backward& a) { VITKERNELS_FOR_ACTIVATION(backward_of) }

#undef VITKERNELS_FOR_ACTIVATION

void forward_any(const Forward& a) { VITKERNELS_FOR_DTYPE(forward) }
void backward_any(const Backward& a) { VITKERNELS_FOR_DTYPE(backward) }

}  // namespace

const batch_norm::Kernels& batch_norm_kernels() {
  static constexpr batch_norm::Kernels kernels = {forward_any, backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
