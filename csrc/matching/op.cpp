// The matching ops' entry points: tensors to plain structs, outputs allocated, the kernel table of this CPU called.
#include "matching/op.h"

#include "common/lengths.h"
#include "common/stable.h"
#include "matching/kernels.h"

namespace vitkernels {
namespace {

const matching::Kernels& kernels() {
  static const matching::Kernels& table = []() -> const matching::Kernels& { VITKERNELS_SELECT_KERNELS(matching_kernels) }();
  return table;
}

// Predictions as the kernels read them, copied where classes or coordinates are not neighbours. They are held here while the kernel runs.
struct Inputs {
  Tensor logits, boxes;

  Inputs(const Tensor& given_logits, const Tensor& given_boxes) : logits(rows_of(given_logits)), boxes(rows_of(given_boxes)) {}

 private:
  static Tensor rows_of(const Tensor& tensor) { return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor); }
};

// These guard memory, also under torch.compile. Outside of it Python then looks for the place and says it in full.
void check_within(const int64_t* values, int64_t count, int64_t least, int64_t end, const char* op, const char* name) {
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) outside |= values[i] < least || values[i] >= end;
  STD_TORCH_CHECK(!outside, "vitkernels::", op, ": ", name, " must lie within ", least, " and ", end - 1);
}

const int64_t* int64_values(const Tensor& tensor, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() && tensor.numel() == count, "vitkernels::", op, ": ", name,
      " must be contiguous int64 of ", count, " elements");
  return static_cast<const int64_t*>(tensor.data_ptr());
}

void fill(
    matching::Detection& a, const Inputs& in, const Tensor& labels, const Tensor& target_boxes, bool focal, double alpha, double gamma,
    const char* op) {
  const Tensor &logits = in.logits, &boxes = in.boxes;
  STD_TORCH_CHECK(logits.dim() == 4 && boxes.dim() == 4 && boxes.size(3) == 4, "vitkernels::", op, ": logits must be [L, B, Q, C], boxes [L, B, Q, 4]");
  for (int64_t i = 0; i < 3; ++i) STD_TORCH_CHECK(logits.size(i) == boxes.size(i), "vitkernels::", op, ": logits and boxes must have the same queries");
  check_same(boxes, logits, "boxes");
  a.dtype = dtype_of(logits);
  a.layers = logits.size(0), a.images = logits.size(1), a.queries = logits.size(2), a.classes = logits.size(3), a.targets = labels.numel();
  a.logits = logits.data_ptr(), a.boxes = boxes.data_ptr();
  a.logits_layer = logits.stride(0), a.logits_image = logits.stride(1), a.logits_query = logits.stride(2);
  a.boxes_layer = boxes.stride(0), a.boxes_image = boxes.stride(1), a.boxes_query = boxes.stride(2);
  STD_TORCH_CHECK(a.classes > 0, "vitkernels::", op, ": logits must have at least one class");
  a.labels = int64_values(labels, a.targets, op, "target_labels");
  check_within(a.labels, a.targets, 0, a.classes, op, "target_labels");
  STD_TORCH_CHECK(
      target_boxes.scalar_type() == accumulation_type(logits) && target_boxes.is_contiguous() && target_boxes.numel() == 4 * a.targets,
      "vitkernels::", op, ": target_boxes must be contiguous [T, 4] in the accumulation dtype");
  a.target_boxes = target_boxes.data_ptr();
  a.focal = focal, a.alpha = alpha, a.gamma = gamma;
  STD_TORCH_CHECK(!kernels().has_negative_side(a), "vitkernels::", op, ": width and height of a box must not be negative");
}

double number(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(tensor.data_ptr()) : *static_cast<const float*>(tensor.data_ptr());
}

void fill(
    matching::Loss& a, const Inputs& in, const Tensor& labels, const Tensor& target_boxes, const Tensor& matches, const Tensor& num_boxes,
    double eos_coef, bool focal, double alpha, double gamma, const char* op) {
  fill(a, in, labels, target_boxes, focal, alpha, gamma, op);
  const int64_t count = a.layers * a.images * a.queries;
  a.matches = int64_values(matches, count, op, "matches");
  check_within(a.matches, count, -1, a.targets, op, "matches");
  STD_TORCH_CHECK(
      num_boxes.numel() == 1 && num_boxes.scalar_type() == accumulation_type(in.logits), "vitkernels::", op,
      ": num_boxes must be one number in the accumulation dtype");
  a.num_boxes = number(num_boxes), a.eos_coef = eos_coef;
}

}  // namespace

Tensor pairwise_box_cost(
    const Tensor& logits, const Tensor& boxes, const Tensor& target_labels, const Tensor& target_boxes, const Tensor& cu_targets,
    std::vector<double> weights, bool focal, double alpha, double gamma) {
  const char* op = "pairwise_box_cost";
  const Inputs in(logits, boxes);
  matching::Cost a{};
  fill(a, in, target_labels, target_boxes, focal, alpha, gamma, op);
  a.cu_targets = int32_values(cu_targets, a.images + 1, op, "cu_targets");
  check_cumulative(a.cu_targets, a.images, a.targets, op, "cu_targets");
  STD_TORCH_CHECK(a.cu_targets[a.images] == a.targets, "vitkernels::", op, ": cu_targets must end at the number of targets");
  STD_TORCH_CHECK(weights.size() == 3, "vitkernels::", op, ": weights must be three numbers");
  a.class_weight = weights[0], a.box_weight = weights[1], a.overlap_weight = weights[2];
  Tensor costs = torch::stable::new_empty(logits, {a.layers, a.targets, a.queries}, accumulation_type(logits));
  a.costs = costs.data_ptr();
  kernels().cost(a);
  return costs;
}

std::tuple<Tensor, Tensor> detection_set_loss(
    const Tensor& logits, const Tensor& boxes, const Tensor& target_labels, const Tensor& target_boxes, const Tensor& matches,
    const Tensor& num_boxes, double eos_coef, bool focal, double alpha, double gamma) {
  const Inputs in(logits, boxes);
  matching::LossForward a{};
  fill(a, in, target_labels, target_boxes, matches, num_boxes, eos_coef, focal, alpha, gamma, "detection_set_loss");
  Tensor losses = torch::stable::new_empty(logits, {a.layers, 3}, accumulation_type(logits));
  Tensor divisors = torch::stable::new_empty(logits, {a.layers}, accumulation_type(logits));
  a.losses = losses.data_ptr(), a.divisors = divisors.data_ptr();
  kernels().loss_forward(a);
  return {losses, divisors};
}

std::tuple<Tensor, Tensor> detection_set_loss_backward(
    const Tensor& grad_losses, const Tensor& logits, const Tensor& boxes, const Tensor& target_labels, const Tensor& target_boxes,
    const Tensor& matches, const Tensor& num_boxes, const Tensor& divisors, double eos_coef, bool focal, double alpha, double gamma) {
  const char* op = "detection_set_loss_backward";
  const Inputs in(logits, boxes);
  matching::LossBackward a{};
  fill(a, in, target_labels, target_boxes, matches, num_boxes, eos_coef, focal, alpha, gamma, op);
  const Tensor grad = dense(grad_losses), by = dense(divisors);
  STD_TORCH_CHECK(
      grad.scalar_type() == accumulation_type(logits) && by.scalar_type() == accumulation_type(logits) && grad.numel() == 3 * a.layers &&
          by.numel() == a.layers,
      "vitkernels::", op, ": grad_losses must be [L, 3] and divisors [L], in the accumulation dtype");
  Tensor grad_logits = torch::stable::new_empty(logits, {a.layers, a.images, a.queries, a.classes});
  Tensor grad_boxes = torch::stable::new_empty(boxes, {a.layers, a.images, a.queries, 4});
  a.grad_losses = grad.data_ptr(), a.divisors = by.data_ptr();
  a.grad_logits = grad_logits.data_ptr(), a.grad_boxes = grad_boxes.data_ptr();
  kernels().loss_backward(a);
  return {grad_logits, grad_boxes};
}

}  // namespace vitkernels
