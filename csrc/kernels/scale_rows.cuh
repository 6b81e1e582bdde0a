// SPDX-License-Identifier: Apache-2.0
// Which group's scales a ring stage has, and where. Positions in K are counted in rows of scales: units of 64 k, of
// fine groups their halves.
//
// By tensor maps (FLAG_SCALE_MAPS) a stage has whole groups, a row each, or is a part of one, with one row. Else it has
// a row for each position, the groups of which may begin anywhere. What lies here takes no GPU: a test compiles it.
#pragma once
#include "gemm_params.h"

namespace machete {

// A group's length, in rows.
DEVICE int group_rows(const GemmParams& p, bool fine) { return fine ? p.group_blocks : (p.group_blocks + 1) / 2; }

// Position `i` of a stage has row i >> row_shift of it.
DEVICE int row_shift(const GemmParams& p, bool fine) {
  return p.flags & FLAG_SCALE_MAPS ? 31 - __clz(group_rows(p, fine)) : 0;
}

// A producer's way through the groups. With tensor maps stage by stage, `groups` of them in each or one for several;
// else row by row.
struct GroupWalk {
  int groups;  // that a copy brings
  int index;   // of its first one
  int span;    // rows from one change of `index` to the next
  int at, boundary, end;

  // `at`: where the K range starts, a multiple of the stage's `rows`.
  DEVICE GroupWalk(const GemmParams& p, bool fine, int rows, int at) : at(at) {
    const bool maps = p.flags & FLAG_SCALE_MAPS;
    const int group = group_rows(p, fine);
    groups = maps && group < rows ? rows >> row_shift(p, fine) : 1;
    span = maps ? max(group, rows) : group;
    end = fine ? (p.k + 31) / 32 : (p.k + 63) / 64;
    // at / span without an integer division, which would delay the first copy: exact below 2^21, since
    // (at + 0.5) / span is at least 0.5 / span away from an integer
    const int spans = at == 0 ? 0 : int((float(at) + 0.5f) * __frcp_rn(float(span)));
    index = spans * groups;
    boundary = (spans + 1) * span;
  }
  // Rows past the end of K keep the last group, so that no stale scale can make a NaN.
  DEVICE void advance(int rows) {
    at += rows;
    if (at >= boundary && boundary < end) {
      index += groups;
      boundary += span;
    }
  }
};

}  // namespace machete
