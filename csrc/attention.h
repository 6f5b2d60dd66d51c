// Attention over the paged cache: what the plan executor asks of an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmb {

// What the cache holds: floats, or integers with a float32 scale for each position and head. Integer sums are
// exact, and every instruction set has a dot of int16. Keys of 15 bits are as exact as float16, which Qwen2's
// biased keys need (benchmarks/DIARY.md, 2026-11-28).
enum class CacheFormat : int { kF32 = 0, kInt16 = 1, kInt8 = 2 };

static constexpr size_t value_bytes(CacheFormat f) {
  return f == CacheFormat::kF32 ? 4 : f == CacheFormat::kInt16 ? 2 : 1;
}

// Values that stand together along the axis that is summed: a dot instruction takes a pair of int16.
static constexpr size_t lane_values(CacheFormat f) { return f == CacheFormat::kF32 ? 1 : 2; }

// Positions that are neighbours in a block's layout; a multiple of them is a block.
constexpr size_t kRun = 16;

// Bytes of one head's keys, or values, in one block: with e = lane_values(f)
//   keys:   [block_size / 16][head_dim / e][16 positions][e]
//   values: [head_dim / 16][block_size / e][16 dimensions][e]
// then, for integers, [block_size] float32 scales. Int8 stores H k and H v, rotated as int8 weights are.
static constexpr size_t head_bytes(CacheFormat f, size_t block_size, size_t head_dim) {
  return block_size * (head_dim * value_bytes(f) + (f == CacheFormat::kF32 ? 0 : 4));
}

struct HeadShape {
  size_t heads = 0, kv_heads = 0, head_dim = 0;
};

// One layer's part of the cache; head h of block b is at b * block_stride + h * head_bytes.
struct CacheLayer {
  CacheFormat format = CacheFormat::kInt16;
  uint8_t* keys = nullptr;
  uint8_t* values = nullptr;
  size_t block_stride = 0, block_size = 0, head_dim = 0;

  size_t at(size_t block, size_t head) const {
    return block * block_stride + head * head_bytes(format, block_size, head_dim);
  }
};

// What the two kernels below share: a sequence's tokens in this batch, from its first.
struct HeadsArgs {
  HeadShape shape;
  const float* qkv = nullptr;  // [tokens][qkv_stride]: [heads + 2 * kv_heads][head_dim] before rotation
  size_t qkv_stride = 0;
  const float* cos = nullptr;  // [tokens][head_dim / 2]
  const float* sin = nullptr;
  const float* q_norm = nullptr;  // [head_dim] or null (Qwen3)
  const float* k_norm = nullptr;
  const float* k_centre =
      nullptr;  // [kv_heads][head_dim] taken from rotated keys before they are rounded, or null
  float eps = 0;
  CacheLayer cache;
  const int32_t* block_table = nullptr;
  size_t first_position = 0;  // of the first token
};

constexpr size_t kKeyTile = 128;  // positions whose softmax is computed at a time
constexpr size_t kAttentionRows =
    24;  // query rows (tokens x heads of a group) that share a pass over the keys

// What a tile of keys gives a row: the values' sum weighted with 2^(score - max), and the weights' sum. Rows
// fold their tiles in the order of positions, so that it does not matter who computed them.
struct Partial {
  float* max = nullptr;     // [tiles][rows]
  float* sum = nullptr;     // [tiles][rows]
  float* values = nullptr;  // [tiles][rows][head_dim]

  static size_t floats(size_t tiles, size_t rows, size_t dim) { return tiles * rows * (dim + 2); }
  Partial() = default;
  Partial(float* at, size_t tiles, size_t rows)
      : max(at), sum(at + tiles * rows), values(sum + tiles * rows) {}
};

// Query rows [row_begin, row_end) of a kv head, row = token * group + head within the group.
struct AttentionArgs : HeadsArgs {
  float scale = 0;
  float* out = nullptr;  // [tokens][out_stride], first token of the sequence
  size_t out_stride = 0;
  size_t kv_head = 0;
  size_t row_begin = 0, row_end = 0;    // at most kAttentionRows
  size_t tile_begin = 0, tile_end = 0;  // tiles of keys
  Partial partial;                      // where tiles go that somebody folds later; null: all tiles are here
};

}  // namespace llmb
