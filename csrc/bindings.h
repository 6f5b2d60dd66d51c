// What the files of the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "layout.h"

namespace llmb {

inline Format format_of(const std::string& name) {
  if (name == "float32") return Format::kF32;
  if (name == "bfloat16") return Format::kBF16;
  if (name == "int8") return Format::kInt8;
  if (name == "int6") return Format::kInt6;
  if (name == "int4") return Format::kInt4;
  throw nanobind::value_error(
      ("unknown format '" + name + "'; one of float32, bfloat16, int8, int6, int4").c_str());
}

void bind_calibrate(nanobind::module_& m);
void bind_pack(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);

}  // namespace llmb
