// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// Runs one operator of the device code under emulation:
//   main FOLDER OPERATOR DTYPE WEIGHTS_DTYPE B H W C RADIUS TF32 MULTIPROCESSORS SHARED_BYTES MISALIGNED DROPPED
//        LAST_FIRST LAST_IMAGE
// Tensors are raw files in the folder, inputs and outputs by name. MISALIGNED shifts the maps of channels by one element.
// With LAST_IMAGE, files hold the last image of the batch, and the last eight blocks of each kernel run: enough for an
// image of one tile, in memory of any size.

#include "emulation.h"

#include <fstream>
#include <iostream>
#include <string>

#include "launch.cuh"

using namespace spatial_range_attention::device;

namespace {

struct Launcher {
  bool last_image;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, Arguments... arguments) const {
    const unsigned first = last_image && blocks > 8 ? static_cast<unsigned>(blocks - 8) : 0;
    emulation::run(first, static_cast<unsigned>(blocks), kThreads, shared_bytes, [&] { kernel(arguments...); });
  }
};

// Of `bytes`, the last `used` are in the file.
class Buffer {
 public:
  Buffer(std::string path, int64_t bytes, int64_t used, bool input, int64_t shift = 0)
      : path_(std::move(path)), offset_(shift + bytes - used), used_(used), shift_(shift), memory_(bytes + shift, used) {
    if (!input) return;
    std::ifstream file(path_, std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(memory_.data() + offset_), used_)) emulation::fail("an input is too short");
  }
  unsigned char* data() const { return memory_.data() + shift_; }
  void write() const {
    std::ofstream(path_, std::ios::binary).write(reinterpret_cast<const char*>(memory_.data() + offset_), used_);
  }

 private:
  std::string path_;
  int64_t offset_, used_, shift_;
  emulation::Guarded memory_;
};

Element element_named(const std::string& name) {
  return name == "float64"    ? Element::float64
         : name == "float32"  ? Element::float32
         : name == "bfloat16" ? Element::bfloat16
                              : Element::float16;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 17) emulation::fail("16 arguments are needed");
  const std::string folder = argv[1], name = argv[2];
  const Element element = element_named(argv[3]), weights_element = element_named(argv[4]);
  const Map map{std::stoll(argv[5]), std::stoi(argv[6]), std::stoi(argv[7]), std::stoi(argv[8]), std::stoi(argv[9])};
  const bool allow_tf32 = std::stoi(argv[10]);
  const Hardware hardware{std::stoi(argv[11]), std::stoi(argv[12]), 2 * (std::stoi(argv[12]) + 1024)};
  const int64_t shift = std::stoi(argv[13]) ? bytes_of(element) : 0;
  emulation::dropped_line = std::stoi(argv[14]);
  emulation::last_first = std::stoi(argv[15]);
  const bool last_image = std::stoi(argv[16]);

  const Launcher launch{last_image};
  const Element sums = element == Element::float64 ? Element::float64 : Element::float32;
  const int64_t images = last_image ? map.batch : 1;
  const auto tensor = [&](const char* file, int64_t bytes, bool input, int64_t shift) {
    return Buffer(folder + "/" + file + ".bin", bytes, bytes / images, input, shift);
  };
  const auto features = [&](const char* file, bool input) {
    return tensor(file, map.positions() * map.channels * bytes_of(element), input, shift);
  };
  const auto weights = [&](const char* file, bool input, Element weight) {
    return tensor(file, map.positions() * map.neighbors() * bytes_of(weight), input, 0);
  };
  const auto scalar = [&](const char* file, bool input) {
    return Buffer(folder + "/" + file + ".bin", bytes_of(sums), bytes_of(sums), input);
  };
  const auto workspace = [&](int64_t count) {
    return Buffer("", count * bytes_of(sums), count * bytes_of(sums) / images, false);
  };
  const auto report = [](const Plan& plan) {
    std::cout << "splits " << plan.splits << " stages " << plan.stages << " recomputed " << emulation::recomputed << "\n";
  };

  if (name == "weights_forward") {
    const Buffer guidance = features("guidance", true), sigma = scalar("sigma", true);
    const Buffer out = weights("weights", false, sums), range_kernel = weights("range_kernel", false, sums);
    const Plan plan = plan_dot(map, element, true, hardware);
    const Buffer dots = workspace(dots_size(map, plan));
    weights_forward(launch, map, element, guidance.data(), sigma.data(), dots.data(), out.data(), range_kernel.data(),
                    plan, allow_tf32);
    out.write();
    range_kernel.write();
    report(plan);
  } else if (name == "weights_backward") {
    const Buffer grad = weights("grad", true, sums), guidance = features("guidance", true);
    const Buffer sigma = scalar("sigma", true), range_kernel = weights("range_kernel", true, sums);
    const Buffer grad_guidance = features("grad_guidance", false), grad_sigma = scalar("grad_sigma", false);
    const Buffer similarity = workspace(map.positions() * map.neighbors()), partial = workspace(gradient_blocks(map));
    const Plan plan = plan_sum(map, element, sums, hardware);
    weights_backward(launch, map, element, grad.data(), guidance.data(), sigma.data(), range_kernel.data(),
                     similarity.data(), partial.data(), grad_guidance.data(), grad_sigma.data(), plan, allow_tf32);
    grad_guidance.write();
    grad_sigma.write();
    report(plan);
  } else if (name == "aggregate") {
    const Buffer source = features("source", true), weight = weights("weights", true, weights_element);
    const Buffer out = features("out", false);
    const Plan plan = plan_sum(map, element, weights_element, hardware);
    launch_sum(launch, map, element, weights_element, source.data(), weight.data(), out.data(), Fold::forward, 1.0,
               plan, allow_tf32);
    out.write();
    report(plan);
  } else if (name == "aggregate_backward") {
    const Buffer grad = features("grad", true), source = features("source", true);
    const Buffer weight = weights("weights", true, weights_element), grad_source = features("grad_source", false);
    const Buffer grad_weights = weights("grad_weights", false, weights_element);
    launch_sum(launch, map, element, weights_element, grad.data(), weight.data(), grad_source.data(), Fold::adjoint,
               1.0, plan_sum(map, element, weights_element, hardware), allow_tf32);
    const Plan plan = plan_dot(map, element, false, hardware);
    const Buffer dots = workspace(dots_size(map, plan));
    aggregate_grad_weights(launch, map, element, weights_element, grad.data(), source.data(), dots.data(),
                           grad_weights.data(), plan, allow_tf32);
    grad_source.write();
    grad_weights.write();
    report(plan);
  } else {
    emulation::fail("no such operator");
  }
  return 0;
}
