// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A timer as it shows in how long connections had rested when they were closed: a narrow cluster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace finrace {

/// Without a learned timeout, a rest as long as this makes an idle close thinkable at all: no server's keep-alive timer
/// is shorter by default. After a response, a FIN or RST this late is an idle close; an earlier FIN belongs to the
/// exchange, an earlier RST cuts the response.
inline constexpr std::uint32_t shortest_idle_timer_ms = 900;

/// How near to an upstream's idle timeout a close came. One at the timeout is its timer's; a busy host's timer may be
/// as late as `near`.
enum class Nearness { far, near, at };

/// An upstream's idle timeout as learned.
struct IdleTimeout {
    std::uint32_t ms;
    std::uint32_t lowest_ms;    ///< of the cluster of idle times behind it
    std::uint32_t highest_ms;   ///< of the same
    std::uint32_t samples;      ///< in the cluster; those of one instant count once. 0: it was told, not learned
    std::uint32_t below_ms = 0; ///< so far below the cluster lie others, of those within a quarter of it
    std::uint32_t above_ms = 0;

    [[nodiscard]] std::uint32_t spread_ms() const { return highest_ms - lowest_ms; }
    /// Of a close after so long a rest, seen from a round-trip time away.
    [[nodiscard]] Nearness nearness(std::uint64_t rested_ms, std::uint64_t rtt_ms) const;
    /// Whether idle connections have been closed about there, if outside the cluster: a timer that is looked at once in
    /// a while (gunicorn's threads) may keep to one part of its range for long, and then leave it.
    [[nodiscard]] bool reaches(std::uint64_t rested_ms, std::uint64_t rtt_ms) const;
};

/// Learns one upstream's idle timeout from idle times at close. Keeps the newest 128, few of one instant, the shortest
/// and the longest among them: a process that ends closes many connections at once, and those that one burst has used
/// had rested alike.
class IdleTimeoutLearner {
public:
    IdleTimeoutLearner() = default;
    /// Knows what another one has learned, not by which samples.
    explicit IdleTimeoutLearner(const IdleTimeout& learned) : known_(learned) {}

    /// What somebody knows of it, or does not any more: it holds as long as nothing is learned.
    void tell(std::optional<std::uint32_t> ms) { told_ms_ = ms; }
    /// Samples come about in the order of `closed_ns`.
    void learn(std::uint32_t idle_ms, std::uint64_t closed_ns);
    /// A connection that had rested for as long was used, and answered, or closed by this host, as seen from a
    /// round-trip time away, and ended at `ended_ns`. So many of them in a row, without an idle close at the timeout
    /// for as long, and that is forgotten: the upstream waits for longer now. Few or for a while they may be
    /// WebSockets, which have other timers.
    void outlived(std::uint32_t rested_ms, std::uint64_t rtt_ms, std::uint64_t ended_ns);
    /// The timeout, if the samples cluster: of at least 3 instants and most of those kept, the more the wider the
    /// cluster. Else the one that was told.
    [[nodiscard]] std::optional<IdleTimeout> timeout() const;
    [[nodiscard]] std::size_t samples() const { return samples_.size(); }
    /// Those that are kept, in no order.
    [[nodiscard]] std::vector<std::uint32_t> idle_times_ms() const;

private:
    static constexpr std::size_t capacity = 128;
    static constexpr unsigned most_of_instant = 4;
    static constexpr unsigned enough_outlived = 20;
    static constexpr std::uint64_t outlived_for_ns = 600'000'000'000;

    [[nodiscard]] std::optional<IdleTimeout> learned() const;
    /// Of the newest instant, which has all that are kept.
    void widen_instant(std::uint32_t idle_ms);

    struct Sample {
        std::uint32_t idle_ms;
        std::uint32_t instant; ///< its number
    };
    class InstantsOf;

    std::vector<Sample> samples_;
    std::size_t next_ = 0;
    std::uint32_t instant_ = 0;
    std::uint64_t instant_began_ns_ = 0;
    unsigned of_instant_ = 0;  ///< samples of the newest one
    std::uint64_t met_ns_ = 0; ///< when a connection was last closed at the timeout
    unsigned outlived_ = 0;    ///< since then
    mutable std::optional<std::optional<IdleTimeout>> known_;
    std::optional<std::uint32_t> told_ms_;
};

} // namespace finrace
