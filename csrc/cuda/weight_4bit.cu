// Quantization, dequantization and look-up of 4-bit weights.
#include "core/lanes_scalar.h"
#include "cuda/blocks.h"
#include "cuda/decode_4bit.h"
#include "cuda/kernels.h"

namespace bnbops::cuda {
namespace {

BNBOPS_DEVICE void store_packed(uint8_t* codes, int64_t first, int64_t count, uint32_t packed) {
  uint8_t* to = codes + first / 2;
  if (count >= kOctet && is_aligned<uint32_t>(to)) return store_vector(to, packed);
  unrolled<kOctet / 2>([&](int i) {
    if (2 * i < count) to[i] = static_cast<uint8_t>(packed >> (i * 8));
  });
}

template <int kGroup, Nibbles kNibbles>
__global__ void __launch_bounds__(kThreads, kResident) quantize_4bit_kernel(QuantizeJob job) {
  __shared__ Encoder4bit encoder;  // each of its tables has an entry in each of the 32 banks: look-ups never conflict
  copy_table(kDeviceFormats4bit[job.format].encoder, encoder);
  __syncthreads();
  const EncoderTables4bit<ScalarLanes> tables(encoder);
  quantize_blocks<kGroup>(job, [&](const float (&x)[kOctet], float inverse, int64_t at, int64_t count) {
    uint32_t packed = 0;
    unrolled<kOctet>([&](int i) {
      packed |= static_cast<uint32_t>(encode_4bit<ScalarLanes>(x[i], inverse, tables)) << nibble_shift(kNibbles, i);
    });
    store_packed(job.codes, at, count, packed);
  });
}

// Eight elements of a row that begins at any element: their codes may begin within a byte, and they may lie in two
// blocks.
template <Nibbles kNibbles>
BNBOPS_DEVICE void decode_askew(const Weight4bit& weight, const Codebook4bit& codebook, int64_t first, int64_t count,
                                float (&x)[kOctet]) {
  unrolled<kOctet>([&](int i) {
    if (i >= count) return;
    const int64_t element = first + i;
    const uint32_t code = code_4bit<kNibbles>(weight.codes[element / 2], static_cast<int>(element % 2));
    x[i] = codebook.value[code] * scale_of_block(weight.scales, block_of(weight, element));
  });
}

constexpr int kOctets = 2;                            // of a thread, on their way together
constexpr int64_t kPiece = kWarp * kOctets * kOctet;  // elements of a row that a warp takes at a time

// A warp writes the piece of the row that begins at element `row` of the weight and at `to` of the result; the piece
// begins `begin` elements into the row.
template <Nibbles kNibbles>
BNBOPS_DEVICE void decode_piece(const LookUpJob& job, const Codebook4bit& codebook, int64_t row, int64_t to,
                                int64_t begin) {
  const Weight4bit& weight = job.weight;
  const int64_t at = begin + threadIdx.x % kWarp * kOctet;
  constexpr int64_t kStride = kWarp * kOctet;
  float x[kOctet] = {};
  if (row % kOctet != 0) {
    for (int64_t i = at; i < begin + kPiece && i < job.width; i += kStride) {
      decode_askew<kNibbles>(weight, codebook, row + i, job.width - i, x);
      store_octet(job.out, job.dtype, to + i, job.width - i, x);
    }
    return;
  }
  uint32_t packed[kOctets];
  float scale[kOctets];
  unrolled<kOctets>([&](int k) {
    const int64_t i = at + k * kStride;
    packed[k] = load_packed(weight.codes, row + i, job.width - i);
    scale[k] = i < job.width ? scale_of_block(weight.scales, block_of(weight, row + i)) : 0.0F;
  });
  unrolled<kOctets>([&](int k) {
    const int64_t i = at + k * kStride;
    decode_packed<kNibbles>(packed[k], codebook, scale[k], x);
    store_octet(job.out, job.dtype, to + i, job.width - i, x);
  });
}

template <Nibbles kNibbles>
__global__ void __launch_bounds__(kThreads, kResident) look_up_kernel(LookUpJob job, int64_t pieces) {
  __shared__ Codebook4bit codebook;
  __shared__ float nested_table[kCodebookSize];
  copy_codebook(job.weight.format, codebook);
  copy_nested_table(job.weight, nested_table);
  __syncthreads();
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < job.count * pieces; i += step) {
    const int64_t row = i / pieces, index = job.index(row);
    DEVICE_ASSERT(index >= 0 && index < job.rows, "bnbops::embedding_4bit: an index is out of range");
    decode_piece<kNibbles>(job, codebook, index * job.width, row * job.width, (i - row * pieces) * kPiece);
  }
}

}  // namespace

cudaError_t quantize_4bit(const QuantizeJob& job, cudaStream_t stream) {
  return with_nibbles_of(job.format, [&](auto nibbles) {
    return with_groups(
        job, [&](auto group, dim3 grid) { return launch(quantize_4bit_kernel<group, nibbles>, grid, stream, job); });
  });
}

cudaError_t look_up_4bit(const LookUpJob& job, cudaStream_t stream) {
  const int64_t pieces = divide_up(job.width, kPiece);
  return with_nibbles_of(job.weight.format, [&](auto nibbles) {
    return launch(look_up_kernel<nibbles>, grid_of(divide_up(job.count * pieces, kWarps)), stream, job, pieces);
  });
}

// A look-up of a table's only row.
cudaError_t dequantize_4bit(const Weight4bit& weight, int64_t numel, void* out, DType dtype, cudaStream_t stream) {
  return look_up_4bit({weight, 1, numel, nullptr, 1, false, out, dtype}, stream);
}

}  // namespace bnbops::cuda
