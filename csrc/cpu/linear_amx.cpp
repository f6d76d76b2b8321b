// Many rows of bfloat16 activations: products of tiles (AMX). A pair of weight tiles at a time is decoded, a panel of
// them that fits the first cache, and multiplied with the packed activations; sums stay in fp32.
//
// A tile product adds A [16, 32] @ B [32, 16]; B's rows come in pairs, its element (2r, c) beside (2r + 1, c).
//   linear:      A = 16 rows of the weight,  B = 16 rows of x, transposed:    the result is transposed
//   input_grad:  A = 16 rows of the gradient, B = 32 rows of the weight, 16 columns
#include <vector>

#include "cpu/amx_tiles.h"
#include "cpu/decode_tiles.h"
#include "cpu/transpose_avx512.h"

BNBOPS_NAMESPACE_BEGIN
namespace {

using cpu::kTile;
using cpu::kTilePair;

constexpr int64_t kTileElements = kTile * kTilePair;  // of bfloat16: 1 KiB, as 16 x 16 of fp32
// Tiles of a panel along the reduced dimension: few enough that a panel stays in the first cache beside the activations
// that stream through it, so that decoding the next one finds its lines there.
constexpr int64_t kSteps = 8;

constexpr int kMaxPairs = 2;
using Panel = uint16_t[kMaxPairs][kSteps][2][kTileElements];  // pairs of weight tiles
struct alignas(64) Sums {
  float tile[2][2][kTile * kTile];  // of a pair of weight tiles and a pair of activation tiles
};

// sums (+)= products over `steps` steps. `activations` are two streams of tiles, `apart` elements from each other.
template <bool kWeightIsLeft>
void multiply_tiles(const uint16_t (&weights)[kSteps][2][kTileElements], const uint16_t* activations, int64_t apart,
                    int64_t steps, bool first, Sums& sums) {
  const SumTiles tiles{{sums.tile[0][0], sums.tile[0][1], sums.tile[1][0], sums.tile[1][1]}, kTileStride};
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    tiles.load();
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, weights[s][0], kTileStride);
    _tile_loadd(5, weights[s][1], kTileStride);
    _tile_loadd(6, activations + s * kTileElements, kTileStride);
    _tile_loadd(7, activations + s * kTileElements + apart, kTileStride);
    if constexpr (kWeightIsLeft) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 7, 4);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  tiles.store();
}

// 32 columns of 16 rows of a matrix [rows, columns]; zeros beyond its edges.
inline void load_tile(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t row, int64_t column,
                      __m512i (&tile)[16]) {
  const int64_t rest = columns - column;
  const __mmask32 some = rest >= kTilePair ? ~0U : (1U << rest) - 1;
  for (int64_t r = 0; r < kTile; ++r) {
    tile[r] =
        row + r < rows ? _mm512_maskz_loadu_epi16(some, matrix + (row + r) * columns + column) : _mm512_setzero_si512();
  }
}

inline void store_tile(const __m512i (&tile)[16], uint16_t* to) {
  for (int64_t r = 0; r < kTile; ++r) _mm512_storeu_si512(to + r * kTilePair, tile[r]);
}

inline int64_t tiles_over(int64_t n) { return (n + kTilePair - 1) / kTilePair; }

inline __m512 widened(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

inline bool is_large(const TileJob& job, int64_t columns) { return job.rows * columns >= 1 << 19; }  // 1 MiB

// Writes 32 sums, columns from `first` on, of a row of `out` that ends at `end`. Lines of a large result go to memory
// directly: reading each of them first, only to overwrite it, would take as long as decoding the weight.
inline void store_sums(__m512 low, __m512 high, const uint16_t* bias, uint16_t* out, int64_t first, int64_t end,
                       bool past_caches) {
  const __mmask32 some = end - first >= kTilePair ? ~0U : (1U << (end - first)) - 1;
  if (bias != nullptr) {
    const __m512i added = _mm512_maskz_loadu_epi16(some, bias + first);
    low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(added)));
    high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(added, 1)));
  }
  const auto words = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const bool whole_line = some == ~0U && reinterpret_cast<uintptr_t>(out + first) % 64 == 0;
  if (whole_line && past_caches) return _mm512_stream_si512(reinterpret_cast<__m512i*>(out + first), words);
  _mm512_mask_storeu_epi16(out + first, some, words);
}

// What a product's two directions have in common. A Direction tells the reduced dimension, how activations are packed,
// how a panel is decoded, and where sums belong.
template <class Direction>
void pack(const TileJob& job, int64_t first, int64_t last) {
  const int64_t reduced = Direction::reduced(job), steps = tiles_over(reduced);
  for (int64_t tile = first; tile < last; ++tile) {
    __m512i values[16];
    load_tile(job.activations, job.rows, reduced, tile / steps * kTile, tile % steps * kTilePair, values);
    Direction::arrange(values);
    store_tile(values, job.packed + tile * kTileElements);
  }
}

template <class Direction>
void multiply(const TileJob& job, int64_t first, int64_t last) {
  constexpr int kPairs = Direction::kPairs;
  const int64_t steps = tiles_over(Direction::reduced(job)), row_pairs = tiles_over(job.rows);
  const TileDecoder decoder(job.weight);
  std::vector<Sums> sums(kPairs * row_pairs);
  alignas(64) Panel panel;
  const TileRegisters registers;
  for (int64_t block = first; block < last; block += kPairs) {
    const auto pairs = static_cast<int>(std::min<int64_t>(kPairs, last - block));
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int64_t n = std::min(kSteps, steps - step);
      Direction::decode(job, decoder, block * kTilePair, pairs, step, n, panel);
      for (int64_t row_pair = 0; row_pair < row_pairs; ++row_pair) {
        const uint16_t* activations = job.packed + (2 * row_pair * steps + step) * kTileElements;
        for (int pair = 0; pair < pairs; ++pair) {
          multiply_tiles<Direction::kWeightIsLeft>(panel[pair], activations, steps * kTileElements, n, step == 0,
                                                   sums[kPairs * row_pair + pair]);
        }
      }
    }
    for (int64_t i = 0; i < row_pairs * kPairs; ++i) {
      if (i % kPairs >= pairs) continue;
      const int64_t column = (block + i % kPairs) * kTilePair, row = i / kPairs * kTilePair;
      Direction::store(job, sums[i].tile[0][0], sums[i].tile[1][0], column, row);
      Direction::store(job, sums[i].tile[0][1], sums[i].tile[1][1], column, row + kTile);
    }
  }
  _mm_sfence();  // for lines written past the caches
}

struct Linear {
  static constexpr bool kWeightIsLeft = true;
  static constexpr int kPairs = 1;
  static int64_t reduced(const TileJob& job) { return job.in_features; }

  static void arrange(__m512i (&x)[16]) {
    for (auto& row : x) row = interleaved(row);
    transpose_dwords(x);
  }

  static void decode(const TileJob& job, const TileDecoder& decoder, int64_t feature, int /*pairs*/, int64_t step,
                     int64_t n, Panel& panel) {
    for (int64_t r = 0; r < kTilePair; ++r) {
      uint16_t* to = panel[0][0][r / kTile] + r % kTile * kTilePair;
      if (feature + r >= job.out_features) {
        for (int64_t s = 0; s < n; ++s) _mm512_store_si512(to + s * 2 * kTileElements, _mm512_setzero_si512());
        continue;
      }
      const int64_t begin = (feature + r) * job.in_features + step * kTilePair;
      decoder.for_chunks_of(begin, n * kTilePair,
                            [&](int64_t s, __m512i chunk) { _mm512_store_si512(to + s * 2 * kTileElements, chunk); });
    }
  }

  static void store(const TileJob& job, const float* low, const float* high, int64_t feature, int64_t row) {
    __m512i values[2][16];
    for (int r = 0; r < kTile; ++r) {
      values[0][r] = _mm512_load_si512(low + r * kTile);
      values[1][r] = _mm512_load_si512(high + r * kTile);
    }
    transpose_dwords(values[0]);
    transpose_dwords(values[1]);
    for (int64_t r = 0; r < kTile && row + r < job.rows; ++r) {
      store_sums(_mm512_castsi512_ps(values[0][r]), _mm512_castsi512_ps(values[1][r]), job.bias,
                 job.out + (row + r) * job.out_features, feature, job.out_features, is_large(job, job.out_features));
    }
  }
};

struct InputGrad {
  static constexpr bool kWeightIsLeft = false;
  static constexpr int kPairs = 2;  // 64 columns: half a cache line of each row's codes
  static int64_t reduced(const TileJob& job) { return job.out_features; }

  static void arrange(__m512i (&)[16]) {}

  // Chunks of one row, from `column` on: one or two.
  static void decode_row(const TileJob& job, const TileDecoder& decoder, int64_t row, int64_t column, int chunks,
                         __m512i (&to)[kPairs]) {
    if (row >= job.out_features) {
      std::fill_n(to, kPairs, _mm512_setzero_si512());
      return;
    }
    constexpr int64_t kAhead = 32;  // rows: each is another stretch of memory
    const int64_t element = row * job.in_features + column;
    decoder.prefetch(element + kAhead * job.in_features);
    __m512i table = decoder.table_at(element);
    to[0] = decoder.decode(element, table);
    if (chunks == 1) return;
    if (decoder.begins_block(element + kChunk32)) table = decoder.table_at(element + kChunk32);
    to[1] = decoder.decode(element + kChunk32, table);
  }

  // Words of two rows alternate; the interleaved order of a chunk makes the result's columns ascend.
  static void decode(const TileJob& job, const TileDecoder& decoder, int64_t column, int pairs, int64_t step, int64_t n,
                     Panel& panel) {
    for (int64_t i = 0; i < n * kTile; ++i) {
      const int64_t row = step * kTilePair + 2 * i, at = i % kTile * kTilePair;
      __m512i even[kPairs], odd[kPairs];
      decode_row(job, decoder, row, column, pairs, even);
      decode_row(job, decoder, row + 1, column, pairs, odd);
      for (int pair = 0; pair < pairs; ++pair) {
        _mm512_store_si512(panel[pair][i / kTile][0] + at, _mm512_unpacklo_epi16(even[pair], odd[pair]));
        _mm512_store_si512(panel[pair][i / kTile][1] + at, _mm512_unpackhi_epi16(even[pair], odd[pair]));
      }
    }
  }

  static void store(const TileJob& job, const float* low, const float* high, int64_t column, int64_t row) {
    for (int64_t r = 0; r < kTile && row + r < job.rows; ++r) {
      store_sums(_mm512_load_ps(low + r * kTile), _mm512_load_ps(high + r * kTile), nullptr,
                 job.out + (row + r) * job.in_features, column, job.in_features, is_large(job, job.in_features));
    }
  }
};

}  // namespace
BNBOPS_NAMESPACE_END

namespace bnbops::cpu {

extern const TileKernels kAmxKernels;
constexpr TileKernels kAmxKernels{
    {BNBOPS_ISA::pack<BNBOPS_ISA::Linear>, BNBOPS_ISA::multiply<BNBOPS_ISA::Linear>},
    {BNBOPS_ISA::pack<BNBOPS_ISA::InputGrad>, BNBOPS_ISA::multiply<BNBOPS_ISA::InputGrad>}};

}  // namespace bnbops::cpu
