// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Secondary failures: a proxy that has lost exchanges may set the upstream aside for a while, and answer clients with
// an error of its own ("no live upstreams"). Each is tied to the failure that it follows from. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <unordered_map>
#include <vector>

#include "bpf/event.h"
#include "core/cause.h"

namespace finrace {

struct Verdict;

/// The failure before, and the error that a client got without any upstream's being tried.
struct Benched {
    event loss; ///< what that verdict is about
    Cause cause;
    event answer;
};

Verdict judge_benched(const Benched& benched);

class Benches {
public:
    /// A verdict's wait, and some more: the answer may be told of before the failure has its name.
    static constexpr std::uint64_t wait_ns = 700'000'000;
    static constexpr std::size_t capacity = 1024;
    static constexpr std::size_t most_upstreams = 4; ///< of each process

    explicit Benches(std::function<void(const Benched&)> deliver) : deliver_(std::move(deliver)) {}

    /// A verdict's event; of each process the newest of few upstreams are kept. Those that a proxy draws no conclusion
    /// from are not.
    void note_loss(const event& e, Cause cause);
    /// An event with CONNECTION_UNTRIED.
    void note_answer(const event& e);
    void advance(std::uint64_t now_ns);
    void finish();

private:
    struct Loss {
        event e;
        Cause cause;
    };
    void judge_oldest();

    std::function<void(const Benched&)> deliver_;
    std::unordered_map<std::uint32_t, std::vector<Loss>> losses_; ///< by process, the newest last
    std::deque<event> answers_;
};

} // namespace finrace
