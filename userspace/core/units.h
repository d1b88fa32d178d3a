// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Units of time, which all rooms count in.
#pragma once

#include <cstdint>

namespace finrace {

inline constexpr std::uint64_t ns_per_ms = 1'000'000;
inline constexpr std::uint64_t ns_per_second = 1'000'000'000;

/// 146 years, of any clock: sums and differences of times before it don't overflow. What a file tells beyond it is
/// damage.
inline constexpr std::uint64_t latest_ns = 1ULL << 62U;

} // namespace finrace
