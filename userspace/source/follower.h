// SPDX-License-Identifier: GPL-2.0-only OR MIT
// From the segments of a capture to events. For each connection it keeps what the socket of the host that opened it
// knew at each moment, calls bpf/connection.h with that as backend cgroup does, and emits the same events.
//
// What that socket had processed when it sent a segment is in the segment's acknowledgement number, wherever the
// capture was taken. So the order is not the capture's: a FIN comes before the first segment that acknowledges it and
// after all others, an RST after all. Times are shifted by half the round trip between that host and the place of the
// capture.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bpf/event.h"
#include "core/vantage.h"
#include "source/capture.h"
#include "source/status.h"

namespace finrace {

/// Where a capture was taken, as far as its segments tell.
struct Vantage {
    TakenAt place = TakenAt::unknown;
    bool sure = false;              ///< else likely
    std::optional<Endpoint> host{}; ///< that it was taken at, where that is one; no port
    std::uint8_t family = 4;        ///< of `host`
    std::uint64_t clients = 0;      ///< connections that it was taken at the client's end of, by their handshakes
    std::uint64_t servers = 0;
    std::uint64_t boths = 0;
    std::uint64_t betweens = 0;
};

/// What a capture turned out not to have.
struct CaptureGaps {
    std::uint64_t missing = 0;       ///< times that something was acknowledged which the capture does not have
    std::uint64_t one_direction = 0; ///< connections of which one direction alone was captured: nothing is said of them
    std::uint64_t guessed = 0;       ///< connections without a handshake, whose client is the likelier of the two ends
};

class Follower {
public:
    using Emit = std::function<void(const event&)>;

    static constexpr std::size_t most_connections = 1U << 17U;

    /// `emit` has the events of all connections in the order in which they happened, as far as they show within two
    /// seconds. `most`: connections that are followed at once; of more the one that has been quiet for longest is given
    /// up.
    explicit Follower(Emit emit, std::size_t most = most_connections);

    void take(const Segment& segment);
    /// The capture ends.
    void finish();

    /// The capture's clock: nanoseconds since 1970.
    [[nodiscard]] std::uint64_t now_ns() const { return now_ns_; }
    [[nodiscard]] const SourceCounts& counts() const { return counts_; } ///< but for what could not be read
    [[nodiscard]] const CaptureGaps& gaps() const { return gaps_; }
    [[nodiscard]] Vantage vantage() const;

private:
    using Index = std::uint32_t;
    static constexpr Index none = ~Index{0};

    /// Payload of the server's up to a sequence number, and when it came.
    struct Mark {
        std::uint32_t end;
        std::uint64_t at_ns;
    };

    /// One connection, as the host that opened it has it. Times are that host's, but where they are said to be the
    /// capture's. Sequence numbers are TCP's; a FIN counts in none of them.
    struct Followed {
        connection c{};
        Endpoint client;
        Endpoint server;
        std::uint8_t family = 4;

        // its place in the table
        Index index = none;
        Index next = none; ///< in its bucket
        Index newer = none;
        Index older = none;
        std::uint64_t captured_ns = 0; ///< the last of it, by the capture's clock

        std::uint64_t now_ns = 0;   ///< the last that happened
        std::uint64_t shift_ns = 0; ///< half the round trip between the host and the place of the capture

        // what the client sent
        std::uint32_t first_seq = 0; ///< the SYN's
        std::uint32_t send_next = 0;
        std::uint32_t acknowledged = 0;
        std::uint32_t hole_begin = 0; ///< of what it sent, not captured so far
        std::uint32_t hole_end = 0;
        std::uint32_t fin_sent_seq = 0;
        std::uint64_t sent_bytes = 0;
        std::uint64_t sent_ns = 0;     ///< payload, new
        std::uint64_t last_try_ns = 0; ///< payload or SYN, new or again
        std::uint64_t try_gap_ns = 0;  ///< between the last two of the same
        std::uint32_t retransmits = 0;
        std::uint32_t tries_unanswered = 0; ///< retransmissions since the server's last segment
        std::uint64_t probe_ns = 0;         ///< a keep-alive probe since then; the capture's clock
        std::uint64_t hole_ns = 0;          ///< when the hole showed, by the capture's clock

        // what came to it
        std::uint32_t receive_next = 0; ///< processed: acknowledged by it
        std::uint32_t arrived = 0;      ///< captured, without a hole
        std::uint32_t ahead_begin = 0;  ///< captured behind a hole
        std::uint32_t ahead_end = 0;
        std::uint64_t bytes_received = 0;
        std::uint64_t last_receive_ns = 0; ///< of what is processed
        std::array<Mark, 4> marks{};       ///< of what is not
        std::uint32_t fin_seq = 0;
        std::uint32_t fin_ack = 0; ///< the highest acknowledgement number when it came
        std::uint64_t fin_ns = 0;
        std::uint64_t reset_with_ack_ns = 0;
        std::uint64_t bare_reset_ns = 0;

        // round trips
        std::uint64_t syn_ns = 0;     ///< the capture's clock, as the next three
        std::uint64_t syn_ack_ns = 0; ///< 0: not captured
        std::uint64_t sample_ns = 0;  ///< 0: none is being taken
        std::uint32_t sample_end = 0;
        std::uint64_t srtt_ns = 0;

        std::uint16_t icmp_error = 0;
        std::uint8_t marked = 0; ///< marks in use
        Heading client_heading = Heading::unknown;
        Heading server_heading = Heading::unknown;
        std::uint8_t client_hops = 0;
        std::uint8_t server_hops = 0;
        bool from_client = false; ///< captured
        bool from_server = false;
        bool other_moved = false; ///< the direction that was not captured is known to have carried something
        bool placed = false;      ///< it has been asked where the capture was taken
        bool knows_send = false;
        bool knows_receive = false;
        bool received_synced = false; ///< the server's payload has been met
        bool request_unseen = false; ///< its sending was: a retransmission of it, or what acknowledges it, is the first
        bool syn_ack_again = false;
        bool fin_seen = false;
        bool fin_whole = false;   ///< all before it has arrived
        bool tail_unseen = false; ///< the last that came, a FIN perhaps, was acknowledged and not captured
        bool gave_up = false;     ///< its kernel has
        bool settles = false;     ///< is in due_
        bool over = false;        ///< what is captured of it from now on means nothing
    };

    /// An address pair's, or an endpoint's.
    struct AddressHash {
        std::size_t operator()(const Endpoint& endpoint) const noexcept;
        std::size_t operator()(const std::pair<Endpoint, Endpoint>& pair) const noexcept;
    };
    /// Something to look at again.
    struct Due {
        std::uint64_t at_ns;
        Index index;
        std::uint64_t id;
    };
    struct Votes {
        std::uint64_t near = 0;
        std::uint8_t family = 4;
    };

    // ---- the table
    [[nodiscard]] std::size_t bucket_of(const Segment& segment) const;
    [[nodiscard]] Index find(const Segment& segment) const;
    Followed& add(const Segment& segment, bool from_client);
    void remove(Index index);
    void touch(Index index);
    void unlink(Index index);
    void link_newest(Index index);
    [[nodiscard]] bool is_from_client(const Segment& segment);

    // ---- what segments mean
    void begin(const Segment& syn);
    void begin_by_answer(const Segment& syn_ack);
    void adopt(const Segment& segment);
    void on_client(Followed& f, const Segment& segment);
    void on_client_ack(Followed& f, std::uint32_t ack);
    void note_sent_unseen(Followed& f, std::uint32_t upto);
    void on_client_payload(Followed& f, const Segment& segment);
    void on_server(Followed& f, const Segment& segment);
    void on_server_ack(Followed& f, const Segment& segment);
    void on_server_payload(Followed& f, const Segment& segment);
    void on_reset(Followed& f, const Segment& segment);
    void on_icmp(const Segment& quoted);
    void on_syn_ack(Followed& f, const Segment& segment);
    void fail_to_open(Followed& f);
    void open(Followed& f);
    void process_received(Followed& f, std::uint32_t upto);
    void process_fin(Followed& f);
    void note_local_close(Followed& f, std::uint32_t how);
    void note_missing(Followed& f);
    void settle_later(Followed& f);
    void settle(Followed& f);
    void settle_due();
    void end_at_end(Followed& f);
    void close(Followed& f);
    void emit(const Followed& f, std::uint8_t kind, std::uint8_t old_state, std::uint32_t acknowledged);
    void emit(const Followed& f, std::uint8_t kind, std::uint8_t old_state)
    {
        emit(f, kind, old_state, f.acknowledged);
    }

    // ---- where it was taken
    void note_round_trip(Followed& f);
    void note_place(Followed& f);
    [[nodiscard]] TakenAt place_by_time(const Followed& f) const;

    /// Hands on what happened until then, by the capture's clock.
    void release(std::uint64_t until_ns);

    Emit emit_;
    std::size_t most_;
    std::multimap<std::uint64_t, event> held_; ///< by their time: what shows later may have happened before
    std::deque<Followed> all_;
    std::vector<Index> free_;
    std::vector<Index> buckets_;
    Index oldest_ = none; ///< quiet for longest
    Index newest_ = none;
    std::size_t used_ = 0;
    std::deque<Due> due_;
    std::uint64_t now_ns_ = 0;
    std::uint64_t last_id_ = 0;
    SourceCounts counts_;
    CaptureGaps gaps_;
    std::unordered_set<Endpoint, AddressHash> servers_; ///< seen to accept
    /// Least round trip between the client and the place of the capture, by both addresses.
    std::unordered_map<std::pair<Endpoint, Endpoint>, std::uint64_t, AddressHash> near_rtt_;
    Vantage votes_;
    std::uint64_t by_heading_ = 0; ///< of the votes
    std::uint64_t by_time_ = 0;
    std::unordered_map<Endpoint, Votes, AddressHash> near_; ///< connections, by the host that they were captured at
};

} // namespace finrace
