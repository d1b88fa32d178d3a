// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A TCP socket with just the sequence numbers and times that a backend reads, which calls bpf/connection.h at the
// same moments and with the same view as bpf/trace.bpf.c and bpf/cgroup.bpf.c do, and keeps the events that those
// would emit. What a segment means is decided in connection.h alone; here is only what the kernel would show of it.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <vector>

#include "bpf/connection.h"
#include "bpf/event.h"

namespace finrace::test {

enum class Backend { trace, cgroup };

/// What the test says of an RST; the sequence number follows from `answers`.
struct ResetOptions {
    enum class Answers { before_fin, after_fin } answers = Answers::before_fin;
    std::optional<std::uint32_t> acknowledges = std::nullopt; ///< bytes of the request; without it the RST has no ACK
    bool header_seen = true;
    std::uint8_t more_flags = 0;
    /// What the socket processes between the RST's coming and the RST itself, where a process held it.
    std::uint64_t behind_received = 0;
    std::uint32_t meets_request = 0;
};

class DrivenSocket {
public:
    static constexpr std::uint64_t ms = 1'000'000;

    explicit DrivenSocket(Backend backend_ = Backend::trace, std::uint32_t first_seq = 1000, bool client_ = true)
        : backend(backend_), client(client_), write_seq_(first_seq), snd_una_(first_seq), request_(first_seq)
    {
    }

    const Backend backend;
    const bool client;
    connection c{};
    std::vector<event> events;
    std::set<unsigned> ring_full_for; ///< kinds of events that find no room
    std::uint64_t now_ns = 5000 * 1000 * ms;
    std::uint64_t tick_ns = 1; ///< the kernel keeps the last receive in ticks
    std::uint32_t srtt_us = 0;
    std::uint32_t retransmits = 0;
    std::uint16_t socket_error = 0;
    std::uint32_t first_bytes = 0; ///< of what is sent, as connection_notable_send() takes them

    void wait_ns(std::uint64_t ns) { now_ns += ns; }
    void wait_ms(std::uint64_t n) { now_ns += n * ms; }

    // ---- opening

    void connect()
    {
        following_ = true;
        connection_start(&c, ++last_id_, now_ns, CONNECTION_CLIENT | callbacks(), TCP_STATE_SYN_SENT);
        state_ = TCP_STATE_SYN_SENT;
    }

    void established()
    {
        const auto old = state_;
        if (following_) {
            connection_established(&c, now_ns);
            move(TCP_STATE_ESTABLISHED, EVENT_OPENED, old);
        }
        state_ = TCP_STATE_ESTABLISHED;
    }

    void open()
    {
        if (client) {
            connect();
        } else {
            following_ = true;
            connection_start(&c, ++last_id_, now_ns, callbacks(), TCP_STATE_SYN_RECV);
            state_ = TCP_STATE_SYN_RECV;
        }
        established();
    }

    /// Open, but before the tracer came.
    void open_unfollowed() { state_ = TCP_STATE_ESTABLISHED; }
    void connect_unfollowed() { state_ = TCP_STATE_SYN_SENT; }

    void open_fails(bool by_reset, std::uint16_t error)
    {
        if (by_reset) {
            const reset_segment reset{.seq = 0,
                                      .ack = write_seq_,
                                      .receive_next = 0,
                                      .flags = TCP_FLAG_BIT_RST | TCP_FLAG_BIT_ACK,
                                      .seen = 1};
            const socket_view v = view();
            connection_peer_reset(&c, &v, &reset);
        }
        socket_error = error;
        move(TCP_STATE_CLOSE, EVENT_OPEN_FAILED, state_);
        following_ = false;
    }

    /// The tracer starts now and takes this connection in.
    void adopt()
    {
        std::uint32_t flags = client ? std::uint32_t{CONNECTION_CLIENT} : 0U;
        if (fin_received_)
            flags |= CONNECTION_PEER_FIN;
        if (local_fin_)
            flags |= CONNECTION_LOCAL_FIN;
        socket_view v{};
        v.now_ns = now_ns;
        v.last_receive_ns = received_ ? last_receive_ns() : 0;
        v.bytes_received = received_;
        v.send_next = write_seq_;
        v.acknowledged = state_ == TCP_STATE_SYN_SENT ? write_seq_ - 1 : snd_una_ + (fin_acknowledged_ ? 1 : 0);
        following_ = true;
        connection_adopt(&c, ++last_id_, &v, sent_payload_ || state_ == TCP_STATE_SYN_SENT ? last_send_ns_ : 0, flags,
                         state_);
    }

    // ---- payload

    /// A new request, in the test's own terms: numbers given to fin(), acknowledge() and reset() count from here.
    void request(std::uint32_t bytes)
    {
        request_ = write_seq_;
        send(bytes);
    }

    /// One write. All of it leaves at once.
    void send(std::uint32_t bytes)
    {
        if (following_ && !connection_plain_send(&c, now_ns, ticks_since_receipt(), raw_received(), write_seq_))
            notable_send(bytes);
        write_seq_ += bytes;
        last_send_ns_ = now_ns;
        sent_payload_ = true;
    }

    /// Acknowledges `bytes` of the request (all of it by default).
    void acknowledge(std::optional<std::uint32_t> bytes = std::nullopt) { snd_una_ = request_end(bytes); }

    /// Payload comes in; by default it acknowledges all that was sent.
    void receive(std::uint64_t bytes, std::optional<std::uint32_t> acknowledges = std::nullopt)
    {
        snd_una_ = request_end(acknowledges);
        received_ += bytes;
        last_receive_ = now_ns;
        if (following_ && backend == Backend::cgroup)
            connection_note_receipt(&c, now_ns / tick_ns);
    }

    // ---- the peer ends

    /// The peer's FIN, acknowledging `acknowledges` bytes of the request (all of it by default).
    void fin(std::optional<std::uint32_t> acknowledges = std::nullopt)
    {
        snd_una_ = request_end(acknowledges);
        const auto old = state_;
        fin_received_ = true;
        switch (old) {
        case TCP_STATE_ESTABLISHED:
            state_ = TCP_STATE_CLOSE_WAIT;
            break;
        case TCP_STATE_FIN_WAIT1:
            state_ = TCP_STATE_CLOSING;
            break;
        case TCP_STATE_FIN_WAIT2: // straight into TIME_WAIT
            state_ = TCP_STATE_CLOSE;
            break;
        default:
            break; // a retransmission
        }
        if (!following_)
            return;
        const socket_view v = view();
        connection_peer_fin(&c, &v);
        if (old == state_)
            return;
        if (packets_only()) {
            emit(EVENT_PEER_FIN, old, old, v);
            end_if_over();
        } else if (old != TCP_STATE_FIN_WAIT2) {
            move(state_, EVENT_PEER_FIN, old);
        } else {
            if (backend == Backend::cgroup)
                emit(EVENT_PEER_FIN, old, old, v);
            ended(old);
        }
    }

    void reset(const ResetOptions& options = {})
    {
        if (!following_)
            return;
        reset_segment segment{};
        if (options.header_seen) {
            segment.seen = 1;
            segment.seq = receive_next() + static_cast<std::uint32_t>(options.behind_received) -
                          (options.answers == ResetOptions::Answers::before_fin && fin_received_ ? 1 : 0);
            segment.flags = static_cast<std::uint8_t>(TCP_FLAG_BIT_RST | options.more_flags);
            if (options.acknowledges) {
                segment.flags |= TCP_FLAG_BIT_ACK;
                segment.ack = request_end(options.acknowledges);
            }
        }
        const auto old = state_;
        // `trace` meets an RST when its socket does, and may not have seen its header.
        const bool early = backend == Backend::cgroup && !packets_only() && options.header_seen;
        segment.receive_next = receive_next();
        if (early)
            connection_note_reset(&c, &segment);
        if (options.behind_received != 0)
            receive(options.behind_received);
        if (options.meets_request != 0) {
            wait_ns(1);
            request(options.meets_request);
        }
        segment.receive_next = receive_next();
        const socket_view v = view();
        bool found = true;
        if (early)
            found = connection_find_reset(&c, &v, old, receive_next(), &segment) != 0;
        else
            segment.receive_next = receive_next();
        if (found)
            connection_peer_reset(&c, &v, &segment);
        emit(EVENT_PEER_RESET, old, old, view());
        socket_error = old == TCP_STATE_CLOSE_WAIT ? 32 : 104; // EPIPE, ECONNRESET
        if (packets_only())
            end_if_over();
        else
            ended(old);
    }

    // ---- this host ends

    /// shutdown(SHUT_WR), or what close() does to a socket without unread bytes.
    void shutdown()
    {
        const auto old = state_;
        state_ = old == TCP_STATE_CLOSE_WAIT ? TCP_STATE_LAST_ACK : TCP_STATE_FIN_WAIT1;
        if (following_) {
            const socket_view before = view();
            connection_local_close(&c, &before, CONNECTION_LOCAL_FIN);
            if (packets_only()) {
                emit(EVENT_LOCAL_FIN, old, old, view());
                end_if_over();
            } else {
                move(state_, EVENT_LOCAL_FIN, old);
            }
        }
        local_fin_ = true;
    }

    /// The process lets go of its socket.
    void close()
    {
        c.flags |= CONNECTION_SOCKET_CLOSED;
        if (state_ == TCP_STATE_ESTABLISHED || state_ == TCP_STATE_CLOSE_WAIT)
            shutdown();
    }

    /// close() with unread bytes or SO_LINGER 0: CLOSE comes before the RST leaves, and is taken for it.
    void abort()
    {
        c.flags |= CONNECTION_SOCKET_CLOSED;
        const socket_view before = view();
        if (following_ && !packets_only() && (state_ == TCP_STATE_ESTABLISHED || state_ == TCP_STATE_CLOSE_WAIT))
            connection_local_close(&c, &before, CONNECTION_LOCAL_RESET);
        ended(state_);
    }

    /// An RST of this host's own accord that a hook does see: an orphan out of patience.
    void local_reset()
    {
        const socket_view v = view();
        connection_local_close(&c, &v, CONNECTION_LOCAL_RESET);
        emit(EVENT_LOCAL_RESET, state_, state_, v);
        if (packets_only())
            end_if_over();
        else
            ended(state_);
    }

    /// The peer acknowledges this host's FIN.
    void local_fin_acknowledged()
    {
        snd_una_ = write_seq_;
        fin_acknowledged_ = true;
        if (state_ == TCP_STATE_FIN_WAIT1)
            state_ = TCP_STATE_FIN_WAIT2;
        else if (following_ && !packets_only())
            ended(state_);
    }

    /// Nothing more is heard of the peer: retransmissions or keep-alive probes came to nothing.
    void times_out(std::uint16_t error = 110) // ETIMEDOUT
    {
        // Of probes the last word is an RST (tcp_keepalive_timer()).
        if (following_ && snd_una_ == write_seq_) {
            const socket_view v = view();
            connection_local_close(&c, &v, CONNECTION_LOCAL_RESET);
            emit(EVENT_LOCAL_RESET, state_, state_, v);
        }
        socket_error = error;
        ended(state_);
    }

    // ---- what came of it

    [[nodiscard]] const event& last() const { return events.back(); }
    [[nodiscard]] const event* last_of(unsigned kind) const
    {
        for (auto e = events.rbegin(); e != events.rend(); ++e)
            if (e->kind == kind)
                return &*e;
        return nullptr;
    }
    [[nodiscard]] bool open_still() const { return following_; }
    [[nodiscard]] std::uint8_t state() const { return state_; }
    [[nodiscard]] std::uint32_t write_seq() const { return write_seq_; }
    [[nodiscard]] std::uint64_t received() const { return received_; }

    [[nodiscard]] socket_view view() const
    {
        socket_view v{};
        v.now_ns = now_ns;
        const bool known =
            backend == Backend::trace ? received_ > 0 : (c.flags & CONNECTION_PEER_FIN) == 0 && c.received_tick != 0;
        v.last_receive_ns = known ? last_receive_ns() : 0;
        v.bytes_received = received_;
        v.send_next = write_seq_;
        v.acknowledged = snd_una_ + (fin_acknowledged_ ? 1 : 0);
        v.retransmits = retransmits;
        return v;
    }

private:
    [[nodiscard]] std::uint32_t receive_next() const
    {
        return 777 + static_cast<std::uint32_t>(received_) + (fin_received_ ? 1 : 0);
    }

    /// The kernel counts the FIN among the bytes received.
    [[nodiscard]] std::uint64_t raw_received() const { return received_ + (fin_received_ ? 1 : 0); }

    void notable_send(std::uint32_t bytes)
    {
        socket_view v = view();
        connection_notable_send(&c, &v, first_bytes, bytes);
        v.send_next += bytes;
        if (connection_requests_after_fin(&c, write_seq_, bytes))
            emit(EVENT_SENT_AFTER_FIN, state_, state_, v);
    }

    [[nodiscard]] std::uint32_t callbacks() const
    {
        return backend == Backend::cgroup ? std::uint32_t{CONNECTION_STATE_CALLBACKS} : 0U;
    }

    /// cgroup, and older than the tracer: sock_ops stays silent, packets are all there is.
    [[nodiscard]] bool packets_only() const
    {
        return backend == Backend::cgroup && (c.flags & CONNECTION_STATE_CALLBACKS) == 0;
    }

    [[nodiscard]] std::uint32_t request_end(std::optional<std::uint32_t> bytes) const
    {
        return bytes ? request_ + *bytes : write_seq_;
    }

    [[nodiscard]] std::uint64_t ticks_since_receipt() const { return now_ns / tick_ns - last_receive_ / tick_ns; }

    /// As jiffies_to_ns() has it: an age in whole ticks.
    [[nodiscard]] std::uint64_t last_receive_ns() const { return now_ns - ticks_since_receipt() * tick_ns; }

    void move(std::uint8_t to, std::uint8_t kind, std::uint8_t from)
    {
        const socket_view v = view();
        c.state = to;
        emit(kind, from, to, v);
    }

    void ended(std::uint8_t from)
    {
        state_ = TCP_STATE_CLOSE;
        if (!following_)
            return;
        move(TCP_STATE_CLOSE, EVENT_CLOSED, from);
        following_ = false;
    }

    void end_if_over()
    {
        constexpr std::uint32_t both = CONNECTION_PEER_FIN | CONNECTION_LOCAL_FIN;
        if ((c.flags & both) == both || (c.flags & (CONNECTION_PEER_RESET | CONNECTION_LOCAL_RESET)) != 0)
            ended(TCP_STATE_CLOSE);
    }

    /// event_begin(), count_lost_event() and what the backends add.
    void emit(std::uint8_t kind, std::uint8_t from, std::uint8_t to, const socket_view& v)
    {
        if (ring_full_for.count(kind) != 0) {
            if (c.lost_events < 255)
                c.lost_events++;
            c.lost_kinds = static_cast<std::uint16_t>(c.lost_kinds | 1U << kind);
            return;
        }
        event e{};
        e.timestamp_ns = v.now_ns;
        e.bytes_received = v.bytes_received;
        e.response_bytes = connection_response_bytes(&c, v.bytes_received);
        e.request_bytes = connection_request_bytes(&c, v.send_next);
        e.unacked_bytes = connection_unacked_bytes(&c, v.send_next, v.acknowledged);
        e.kind = kind;
        e.old_state = from;
        e.new_state = to;
        e.observed = OBSERVED_RESET_HEADER | OBSERVED_CLOSE_CALL;
        if (backend == Backend::trace) {
            e.observed |=
                OBSERVED_PROCESS | OBSERVED_SEND_QUEUE | OBSERVED_SOCKET_ERROR | OBSERVED_UNREAD | OBSERVED_NETNS;
            e.socket_error = socket_error;
        }
        e.version = FINRACE_EVENT_VERSION;
        e.family = 4;
        const std::uint8_t local[] = {192, 0, 2, 1};
        const std::uint8_t peer[] = {192, 0, 2, 2};
        for (unsigned i = 0; i < 4; ++i) {
            e.local_address[i] = local[i];
            e.peer_address[i] = peer[i];
        }
        e.local_port = 40000;
        e.peer_port = 8000;
        e.srtt_us = srtt_us;
        e.retransmits = v.retransmits;
        e.connection = c;
        if ((c.flags & CONNECTION_PEER_FIN) == 0)
            e.connection.peer_fin_ns = 0;
        events.push_back(e);
    }

    std::uint8_t state_ = TCP_STATE_CLOSE;
    bool following_ = false;
    std::uint32_t write_seq_;
    std::uint32_t snd_una_;
    std::uint32_t request_;
    std::uint64_t received_ = 0;
    std::uint64_t last_receive_ = 0;
    std::uint64_t last_send_ns_ = 0;
    bool sent_payload_ = false;
    bool fin_received_ = false;
    bool local_fin_ = false;
    bool fin_acknowledged_ = false;
    std::uint64_t last_id_ = 0;
};

} // namespace finrace::test
