// The table of contents: every operator's schema; and the Python module _C, whose import registers
// schemas and CPU kernels and which states how it was built.
//
// Schemas are positional; one that writes into an argument returns ().  What an operator means is
// said in python/segfuse/ops/<op>.py.
#include <torch/csrc/stable/library.h>

namespace {

void define(torch::stable::detail::StableLibrary& m) {
  m.def(
      "confusion_matrix(Tensor prediction, Tensor target, int num_classes, int? ignore_index) -> "
      "Tensor");
  m.def("crop_concat(Tensor skip, Tensor up) -> Tensor");
  m.def("crop_concat_out(Tensor skip, Tensor up, Tensor(a!) out) -> ()");
  m.def("crop_concat_backward(Tensor grad, SymInt[] skip_size) -> Tensor");
  m.def(
      "deconv_upsample(Tensor x, Tensor? weight, Tensor? skip, int factor, int kernel_size, "
      "SymInt[] offset, SymInt[] size) -> Tensor");
  m.def(
      "deconv_upsample_out(Tensor x, Tensor? weight, Tensor? skip, int factor, int kernel_size, "
      "SymInt[] offset, Tensor(a!) out) -> ()");
  m.def(
      "deconv_upsample_backward_x(Tensor grad, Tensor? weight, int factor, int kernel_size, "
      "SymInt[] offset, SymInt[] size) -> Tensor");
  m.def(
      "deconv_upsample_backward_weight(Tensor grad, Tensor x, int factor, int kernel_size, "
      "SymInt[] offset, ScalarType dtype) -> Tensor");
  m.def(
      "elastic_deform(Tensor image, Tensor grid, Tensor? affine, int border, float fill) -> "
      "Tensor");
  m.def(
      "elastic_deform_labels(Tensor image, Tensor grid, Tensor? affine, Tensor labels, int border, "
      "float fill, float labels_fill) -> (Tensor, Tensor)");
  m.def(
      "elastic_deform_out(Tensor image, Tensor grid, Tensor? affine, int border, float fill, "
      "Tensor(a!) out) -> ()");
  m.def(
      "elastic_deform_labels_out(Tensor image, Tensor grid, Tensor? affine, Tensor labels, int "
      "border, float fill, float labels_fill, Tensor(a!) out, Tensor(b!) labels_out) -> ()");
  m.def(
      "elastic_deform_backward_image(Tensor grad, Tensor grid, Tensor? affine, int border) -> "
      "Tensor");
  m.def(
      "elastic_deform_backward_field(Tensor grad, Tensor image, Tensor grid, Tensor? affine, int "
      "border, float fill) -> (Tensor, Tensor)");
  m.def(
      "gather_tiles(Tensor image, Tensor corners, SymInt[] size, int border, float fill, "
      "ScalarType "
      "dtype, Tensor? scale, Tensor? shift) -> Tensor");
  m.def(
      "gather_tiles_out(Tensor image, Tensor corners, int border, float fill, Tensor? scale, "
      "Tensor? shift, Tensor(a!) out) -> ()");
  m.def(
      "gather_tiles_backward(Tensor grad, Tensor corners, SymInt[] size, int border, Tensor? "
      "scale) "
      "-> Tensor");
  m.def(
      "label_distances(Tensor labels, float z, float y, float x, bool squared) -> (Tensor, "
      "Tensor)");
  m.def("separate_touching(Tensor labels) -> Tensor");
  m.def("stitch_tiles(Tensor tiles, Tensor corners, SymInt[] size, Tensor? window) -> Tensor");
  m.def("stitch_tiles_out(Tensor tiles, Tensor corners, Tensor? window, Tensor(a!) out) -> ()");
  m.def(
      "stitch_tiles_argmax(Tensor tiles, Tensor corners, SymInt[] size, Tensor? window) -> Tensor");
  m.def(
      "stitch_tiles_argmax_out(Tensor tiles, Tensor corners, Tensor? window, Tensor(a!) out) -> "
      "()");
  m.def(
      "unet_weight_map(Tensor labels, float border, float sigma, float? halo, float sigma1, float "
      "background, float cell, bool balanced, bool everywhere, int[] ignored) -> Tensor");
  m.def(
      "unet_weight_map_out(Tensor labels, float border, float sigma, float? halo, float sigma1, "
      "float background, float cell, bool balanced, bool everywhere, int[] ignored, Tensor(a!) "
      "out) -> ()");
  m.def("upconv_concat(Tensor skip, Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "upconv_concat_backward(Tensor grad, Tensor x, Tensor weight, bool for_x, bool for_weight, "
      "bool for_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "upsample_argmax(Tensor scores, Tensor? weight, int factor, int kernel_size, SymInt[] "
      "offset, "
      "bool align_corners, SymInt[] size, bool confidence) -> (Tensor, Tensor)");
  m.def(
      "upsample_argmax_out(Tensor scores, Tensor? weight, int factor, int kernel_size, SymInt[] "
      "offset, bool align_corners, Tensor(a!) labels, Tensor(b!)? confidence) -> ()");
  m.def(
      "upsample_cross_entropy(Tensor scores, Tensor target, Tensor? weight, Tensor? weight_map, "
      "Tensor? class_weight, int factor, int kernel_size, SymInt[] offset, bool align_corners, "
      "int? ignore_index, int reduction, float label_smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "upsample_cross_entropy_backward(Tensor grad, Tensor scores, Tensor target, Tensor? weight, "
      "Tensor? weight_map, Tensor? class_weight, Tensor log_sums, Tensor denominator, int factor, "
      "int kernel_size, SymInt[] offset, bool align_corners, int? ignore_index, int reduction, "
      "float label_smoothing) -> Tensor");
  m.def(
      "upsample_cross_entropy_backward_weight(Tensor grad, Tensor scores, Tensor target, Tensor? "
      "weight, Tensor? weight_map, Tensor? class_weight, Tensor log_sums, Tensor denominator, int "
      "factor, int kernel_size, SymInt[] offset, bool align_corners, int? ignore_index, int "
      "reduction, float label_smoothing) -> Tensor");
  m.def(
      "weighted_cross_entropy(Tensor logits, Tensor target, Tensor? weight_map, Tensor? "
      "class_weight, "
      "int? ignore_index, int reduction, float label_smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "weighted_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? "
      "weight_map, "
      "Tensor? class_weight, Tensor log_sums, Tensor denominator, int? ignore_index, int "
      "reduction, "
      "float label_smoothing) -> Tensor");
}

}  // namespace

#if defined(SEGFUSE_EMULATED)

#include "core/emulator.h"

STABLE_TORCH_LIBRARY(segfuse_emulated, m) { define(m); }

extern "C" [[gnu::visibility("default")]] void segfuse_emulator_set_seed(unsigned long seed) {
  segfuse::emulator::set_seed(seed);
}

#else

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/host.h"

STABLE_TORCH_LIBRARY(segfuse, m) { define(m); }

PYBIND11_MODULE(_C, m) {
  namespace host = segfuse::host;
  m.doc() = "Schemas, CPU kernels and the facts of this build.";
  m.attr("cuda_architectures") = SEGFUSE_CUDA_ARCHITECTURES;
  m.attr("cuda_version") = SEGFUSE_CUDA_VERSION;
  m.attr("torch_version") = SEGFUSE_TORCH_VERSION;
  m.attr("torch_target") = SEGFUSE_TORCH_TARGET;
  m.attr("sanitize") = SEGFUSE_SANITIZE;
  m.def(
      "isas",
      [] {
        return std::vector<std::string>(host::names.begin(),
                                        host::names.begin() + static_cast<int>(host::best()) + 1);
      },
      "The instruction sets that this CPU can run, the best last.");
  m.def(
      "isa", [] { return std::string(host::names[static_cast<int>(host::isa)]); },
      "The instruction set in use.");
  m.def(
      "set_isa", [](const std::string& name) { host::isa = host::parse(name); },
      pybind11::arg("name"), "Choose an instruction set; an empty name means the best.");
  m.def(
      "streams_from", [] { return host::streams_from; },
      "Bytes of an output from which on it is written past the cache.");
  m.def(
      "set_streams_from", [](int64_t bytes) { host::streams_from = bytes; }, pybind11::arg("size"),
      "Change it; for tests.");
  const char* named = std::getenv("SEGFUSE_ISA");
  host::isa = host::parse(named ? named : "");
}

#endif
