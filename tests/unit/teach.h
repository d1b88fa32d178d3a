// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Idle closes for a learner, each at an instant of its own.
#pragma once

#include <cstdint>

#include "core/upstream.h"

namespace finrace::test {

/// The close is a second after the one before it, whosever that was.
inline void teach(IdleTimeoutLearner& learner, std::uint32_t idle_ms)
{
    static std::uint64_t closed_ns = 0;
    learner.learn(idle_ms, closed_ns += 1'000'000'000);
}

} // namespace finrace::test
