// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
//
// The PTX that the tensor-core kernels are made of: asynchronous copies, fragment loads, matrix products. Layouts are
// those of the PTX manual, "Matrix multiply-accumulate using mma" (with g = lane / 4 and t = lane % 4):
//   accumulator 16×8: rows g, g + 8; columns 2t, 2t + 1.
//   factors of 16-bit elements (16×16, 16×8) and of TF32 elements (16×8, 8×8) occupy the same 32-byte rows, so that the
//   same four 8×16-byte matrices of `load_matrices` feed both.
// tests/emulation/emulation.h has the same functions as host C++.

#ifndef SPATIAL_RANGE_ATTENTION_MMA_CUH
#define SPATIAL_RANGE_ATTENTION_MMA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace spatial_range_attention::device {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or zeros where `inside` is false (`source` must be a valid address anyway).
__device__ __forceinline__ void copy_async(void* target, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 rows × 16 bytes; lanes 8i..8i+7 give the row addresses of matrix i. Lane l receives bytes
// 4·(l % 4).. of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for the transposed 8×8 matrices of 16-bit elements.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define SPATIAL_RANGE_ATTENTION_MULTIPLY_ADD(TYPE, SHAPE_AND_TYPES)                                          \
  template <>                                                                                                \
  __device__ __forceinline__ void multiply_add<TYPE>(float (&sum)[4], const uint32_t (&a)[4],                \
                                                     const uint32_t (&b)[2]) {                               \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "       \
                 "{%0, %1, %2, %3};"                                                                         \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                        \
  }

SPATIAL_RANGE_ATTENTION_MULTIPLY_ADD(__half, "m16n8k16.row.col.f32.f16.f16.f32")
SPATIAL_RANGE_ATTENTION_MULTIPLY_ADD(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SPATIAL_RANGE_ATTENTION_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")

#undef SPATIAL_RANGE_ATTENTION_MULTIPLY_ADD

}  // namespace spatial_range_attention::device

#endif  // SPATIAL_RANGE_ATTENTION_MMA_CUH
