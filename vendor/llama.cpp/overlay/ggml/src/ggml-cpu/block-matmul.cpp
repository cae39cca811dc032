#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-block-matmul.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace {

constexpr int kBlocks  = 48;       // blocks of a row that are unpacked at a time
constexpr int kColumns = 128;      // columns for which a tile is unpacked
constexpr int kWords   = QK4_1/4;  // a block's weights, four to a word

// kLanes: rows of a tile, one per lane. kStep: columns whose sums are kept in registers.
// dot: the product of four unsigned with four signed bytes in each lane, added to sum. transpose: a 4x4 of words in each 128 bits.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

constexpr int kLanes = 16;
constexpr int kStep  = 8;
typedef __m512i Ints;
typedef __m512  Floats;

inline Ints dot(Ints sum, Ints weights, int32_t four) {
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(four));
}
inline Ints add(Ints a, Ints b) {
    return _mm512_add_epi32(a, b);
}
inline Floats to_floats(Ints x) {
    return _mm512_cvtepi32_ps(x);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Ints low_halves(Ints bytes) {
    return _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f));
}
inline Ints shifted(Ints words) {
    return _mm512_srli_epi16(words, 4);
}
// The 16 bytes at base + offsets[r], base + offsets[r + 4], ..., one in each 128 bits.
inline Ints every_fourth(const char * base, const int32_t * offsets, int r) {
    const auto at = [=](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(base + offsets[r + 4*i])); };
    const Ints x = _mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, at(2), 2), at(3), 3);
}
// The word at base + offsets[r], for each r: loads and insertions, as a gather takes twice the time.
inline Ints every_word(const char * base, const int32_t * offsets) {
    const auto at = [=](int r) { int32_t word; memcpy(&word, base + offsets[r], sizeof(word)); return word; };
    return _mm512_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15));
}
inline void transpose(const Ints * in, Ints * out) {
    const Ints a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpacklo_epi32(in[2], in[3]);
    const Ints c = _mm512_unpackhi_epi32(in[0], in[1]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
}
// The two f16 at base + offsets[r], for each r.
inline void two_halves(const char * base, const int32_t * offsets, Floats & first, Floats & second) {
    const Ints words = every_word(base, offsets);
    first  = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
    second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
}

#else

constexpr int kLanes = 8;
constexpr int kStep  = 4;
typedef __m256i Ints;
typedef __m256  Floats;

inline Ints dot(Ints sum, Ints weights, int32_t four) {
    const Ints pairs = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(four));  // at most 2*15*127: never saturated
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints add(Ints a, Ints b) {
    return _mm256_add_epi32(a, b);
}
inline Floats to_floats(Ints x) {
    return _mm256_cvtepi32_ps(x);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline Ints low_halves(Ints bytes) {
    return _mm256_and_si256(bytes, _mm256_set1_epi8(0x0f));
}
inline Ints shifted(Ints words) {
    return _mm256_srli_epi16(words, 4);
}
inline Ints every_fourth(const char * base, const int32_t * offsets, int r) {
    const auto at = [=](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(base + offsets[r + 4*i])); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
}
inline Ints every_word(const char * base, const int32_t * offsets) {
    const auto at = [=](int r) { int32_t word; memcpy(&word, base + offsets[r], sizeof(word)); return word; };
    return _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
}
inline void transpose(const Ints * in, Ints * out) {
    const Ints a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
    const Ints c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
}
inline void two_halves(const char * base, const int32_t * offsets, Floats & first, Floats & second) {
    const Ints words = every_word(base, offsets);
    const Ints order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const Ints halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, order), 0xd8);
    first  = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    second = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

#endif

// One block of each row of a tile.
struct Tile {
    Ints   weights[kWords];
    Floats scale;
    Floats minimum;
};

// The blocks at base + offsets[r], for each row r of the tile.
inline Tile unpack(const char * base, const int32_t * offsets) {
    Tile tile;
    two_halves(base, offsets, tile.scale, tile.minimum);
    Ints rows[4];
    for (int r = 0; r < 4; ++r) {
        rows[r] = every_fourth(base + offsetof(block_q4_1, qs), offsets, r);
    }
    Ints words[4];
    transpose(rows, words);
    for (int w = 0; w < 4; ++w) {
        tile.weights[w]     = low_halves(words[w]);
        tile.weights[w + 4] = low_halves(shifted(words[w]));
    }
    return tile;
}

// totals[c] += product of the tile's rows with column c, of N columns. In each lane the same operations whatever N is.
template <int N> inline void multiply(const Tile & tile, const block_q8_1 * const * columns, int block, Floats * totals) {
    constexpr int chains = N < 2 ? 4 : N < 4 ? 2 : 1;  // independent sums, for few columns: integers, in any order the same
    Ints sums[N][chains] = {};
#pragma GCC unroll 8
    for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) {
            int32_t four;
            memcpy(&four, columns[c][block].qs + 4*w, sizeof(four));
            sums[c][w%chains] = dot(sums[c][w%chains], tile.weights[w], four);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        for (int i = 1; i < chains; ++i) {
            sums[c][0] = add(sums[c][0], sums[c][i]);
        }
        const float d = _cvtsh_ss(columns[c][block].data.data.d);
        const float s = _cvtsh_ss(columns[c][block].data.data.s);
        totals[c] = multiply_add(to_floats(sums[c][0]), tile.scale*d, multiply_add(tile.minimum, Floats{} + s, totals[c]));
    }
}

// The same over n blocks that are unpacked, with sums in memory.
template <int N> void multiply_all(const Tile * tiles, int n, const block_q8_1 * const * columns, Floats * sums) {
    Floats totals[N];
    std::copy(sums, sums + N, totals);
    for (int b = 0; b < n; ++b) {
        multiply<N>(tiles[b], columns, b, totals);
    }
    std::copy(totals, totals + N, sums);
}

using MultiplyAll = void (*)(const Tile *, int, const block_q8_1 * const *, Floats *);

constexpr MultiplyAll kMultiplyAll[] = {
    nullptr, multiply_all<1>, multiply_all<2>, multiply_all<3>, multiply_all<4>, multiply_all<5>, multiply_all<6>, multiply_all<7>, multiply_all<8>,
};

}  // namespace

bool ggml_block_matmul(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * weights     = dst->src[0];
    const ggml_tensor * activations = dst->src[1];
    if (params->use_ref || weights->type != GGML_TYPE_Q4_1 || activations->type != GGML_TYPE_F32 || weights->ne[2] != 1 ||
        weights->ne[3] != 1 || weights->nb[1]*kLanes > INT32_MAX) {
        return false;
    }
    const int64_t n_rows    = weights->ne[1];
    const int64_t n_columns = ggml_nrows(activations);
    const int     n_blocks  = static_cast<int>(weights->ne[0]/QK4_1);
    const int64_t n_tiles   = (n_rows + kLanes - 1)/kLanes;
    const int64_t n_parts   = (n_columns + kColumns - 1)/kColumns;
    const auto *  packed    = static_cast<const block_q8_1 *>(params->wdata);  // [n_columns, n_blocks]

    Tile   tiles[kBlocks];
    Floats sums[kColumns];
    for (int64_t unit = params->ith; unit < n_tiles*n_parts; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t row     = unit%n_tiles*kLanes;
        const int64_t column  = unit/n_tiles*kColumns;
        const int     rows    = static_cast<int>(std::min<int64_t>(kLanes, n_rows - row));
        const int     columns = static_cast<int>(std::min<int64_t>(kColumns, n_columns - column));
        const char *  base    = static_cast<const char *>(weights->data) + row*weights->nb[1];
        int32_t       offsets[kLanes];
        for (int r = 0; r < kLanes; ++r) {  // a tile that is not full repeats its last row
            offsets[r] = static_cast<int32_t>(std::min(r, rows - 1)*weights->nb[1]);
        }
        std::fill(sums, sums + columns, Floats{});
        if (columns == 1) {
            const block_q8_1 * operand = packed + column*n_blocks;
            for (int b = 0; b < n_blocks; ++b) {
                multiply<1>(unpack(base + b*sizeof(block_q4_1), offsets), &operand, b, sums);
            }
        }
        for (int first = 0; columns > 1 && first < n_blocks; first += kBlocks) {
            const int n = std::min(kBlocks, n_blocks - first);
            for (int b = 0; b < n; ++b) {
                tiles[b] = unpack(base + (first + b)*sizeof(block_q4_1), offsets);
            }
            for (int c = 0; c < columns; c += kStep) {
                const int step = std::min(kStep, columns - c);
                const block_q8_1 * operands[kStep];
                for (int i = 0; i < step; ++i) {
                    operands[i] = packed + (column + c + i)*n_blocks + first;
                }
                kMultiplyAll[step](tiles, n, operands, sums + c);
            }
        }
        for (int c = 0; c < columns; ++c) {
            const int64_t i    = column + c;
            const int64_t i1   = i%dst->ne[1];
            const int64_t i2   = i/dst->ne[1]%dst->ne[2];
            const int64_t i3   = i/dst->ne[1]/dst->ne[2];
            char *        into = static_cast<char *>(dst->data) + row*sizeof(float) + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3];
            memcpy(into, &sums[c], rows*sizeof(float));
        }
    }
    return true;
}

#else

bool ggml_block_matmul(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
