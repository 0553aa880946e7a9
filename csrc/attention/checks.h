// What is looked at in the values of a call's index tensors before a kernel follows them. Messages name the arguments
// of the Python functions.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "params.h"

namespace llmkern {

// The length of the longest of the `count` sequences, which is at most `promised` unless that is negative.
inline int64_t longest(const char* side, const AttentionBounds& bounds, int64_t count, int64_t promised) {
  auto at = [&](int64_t i) { return integer(bounds.data, bounds.is_64, i); };
  bool rise = at(0) == 0 && at(count) == bounds.total;
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) rise = rise && at(i) <= at(i + 1), most = std::max(most, at(i + 1) - at(i));
  if (!rise) {
    std::string got;
    for (int64_t i = 0; i <= count && i < 8; i++) got += (i ? ", " : "") + std::to_string(at(i));
    throw std::invalid_argument(std::string("cu_seqlens_") + side +
                                ": expected bounds that rise from 0 to the number of tokens, " +
                                std::to_string(bounds.total) + ", got [" + got + (count >= 8 ? ", ...]" : "]"));
  }
  if (promised >= 0 && most > promised)
    throw std::invalid_argument(std::string("max_seqlen_") + side +
                                ": expected at least the length of the longest sequence, " + std::to_string(most) +
                                ", got " + std::to_string(promised));
  return most;
}

// How many tokens the longest sequence has in a cache with room for `capacity`, after `added` new ones.
inline int64_t check_cache(const CacheLengths& lengths, int64_t added, const AttentionPages& pages, int64_t batch,
                           int64_t capacity) {
  int64_t most = 0, room = capacity - added;
  for (int64_t b = 0; b < batch; b++) {
    int64_t held = lengths.data ? integer(lengths.data, lengths.is_64, b * lengths.step) : room;
    if (held < 0 || held > room)
      throw std::invalid_argument("cache_seqlens: expected lengths in [0, " + std::to_string(room) + "], so that " +
                                  std::to_string(added) + " more fit into " + std::to_string(capacity) +
                                  " places, got " + std::to_string(held));
    most = std::max(most, held + added);
    for (int64_t page = 0; pages.table && page * pages.size < held + added; page++) {
      int64_t at = integer(pages.table, pages.is_64, b * pages.step + page);
      if (at < 0 || at >= pages.count)
        throw std::invalid_argument("block_table: expected pages in [0, " + std::to_string(pages.count) +
                                    ") wherever a sequence has tokens, got " + std::to_string(at));
    }
  }
  return most;
}

// Every position that something is rotated to is in the tables of angles.
inline void check_positions(const CacheParams& p) {
  if (!p.rotation.cos) return;
  int64_t steps = std::max(p.added, p.ordered ? p.queries : 1), most = -1;
  for (int64_t b = 0; b < p.batch; b++)
    most = std::max(most, integer(p.lengths.data, p.lengths.is_64, b * p.lengths.step) + steps - 1);
  if (most >= p.rotation.length)
    throw std::invalid_argument("rotary_cos: expected (length, R/2) with a row for position " + std::to_string(most) +
                                ", got shape (" + std::to_string(p.rotation.length) + ", " +
                                std::to_string(p.rotation.rotated / 2) + ")");
}

}  // namespace llmkern
