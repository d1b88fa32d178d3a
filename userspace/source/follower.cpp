// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/follower.h"

#include <algorithm>
#include <cstring>

#include "bpf/connection.h"
#include "core/flags.h"
#include "core/units.h"

namespace finrace {

namespace {

/// What may still come that was sent before a close was known: far more than a round trip.
constexpr std::uint64_t settle_ns = 2'000 * ns_per_ms;

constexpr std::size_t most_held = 1U << 16U; ///< events; of more the oldest is handed on

/// No retransmission is as close to what it repeats (RFC 6298: a second, Linux: 200 ms): that is the same packet, met
/// on another device (-i any).
constexpr std::uint64_t same_packet_ns = 10 * ns_per_ms;

/// Linux retransmits after 200 ms at the least, but for what acknowledgements say to be lost.
constexpr std::uint64_t retransmission_ns = 150 * ns_per_ms;

/// By how much a segment may take longer than the fastest one, beside an eighth of the round trip. That a busy host
/// keeps one for so long is common; that an RST is lost just before a request, all but unheard of.
constexpr std::uint64_t jitter_ns = 10 * ns_per_ms;

/// A connection that was over and is heard of again after so long is another one, whose handshake was not captured.
constexpr std::uint64_t forgotten_ns = 60'000 * ns_per_ms;

/// RFC 6298 2: the first SYN is repeated after a second; Linux doubles from there.
constexpr std::uint64_t first_syn_gap_ns = 1'000 * ns_per_ms;

/// Retransmissions are two minutes apart at most (TCP_RTO_MAX); what a damaged file says may be centuries.
constexpr std::uint64_t longest_gap_ns = 3'600'000 * ns_per_ms;

/// What sequence numbers are apart by more than that comes from damage, or from another connection.
constexpr std::uint32_t most_apart = 1U << 30U;

constexpr std::uint64_t longest_round_trip_ns = 10'000 * ns_per_ms;
constexpr std::size_t most_addresses = 1U << 16U; ///< of each table
/// An answer to a probe takes a round trip; Linux waits for one for a whole second at least (TCP_KEEPINTVL).
constexpr std::uint64_t probe_answer_ns = 500 * ns_per_ms;

constexpr std::uint64_t by_time_ns = 60'000; ///< a shorter round trip does not tell the ends apart
constexpr std::uint64_t times_nearer = 5;
constexpr std::uint64_t votes_for_sure = 3;
constexpr std::uint64_t most_agree_percent = 90;

std::uint64_t mix(std::uint64_t value)
{
    value = (value ^ value >> 32U) * 0x9e3779b97f4a7c15ULL;
    return value ^ value >> 29U;
}

std::uint64_t hash_of(const Endpoint& endpoint)
{
    std::uint64_t halves[2];
    std::memcpy(halves, endpoint.address.data(), sizeof(halves));
    return mix(mix(halves[0] + endpoint.port) + halves[1]);
}

Endpoint without_port(Endpoint endpoint)
{
    endpoint.port = 0;
    return endpoint;
}

/// When the client sent what was captured at `captured_ns`, and when what was captured then came to it.
std::uint64_t sent_at(std::uint64_t captured_ns, std::uint64_t shift_ns)
{
    return captured_ns > shift_ns ? captured_ns - shift_ns : 0;
}

} // namespace

std::size_t Follower::AddressHash::operator()(const Endpoint& endpoint) const noexcept
{
    return hash_of(endpoint);
}

std::size_t Follower::AddressHash::operator()(const std::pair<Endpoint, Endpoint>& pair) const noexcept
{
    return mix(hash_of(pair.first)) + hash_of(pair.second);
}

Follower::Follower(Emit emit, std::size_t most) : emit_(std::move(emit)), most_(most)
{
    std::size_t buckets = 1;
    while (buckets < most_)
        buckets *= 2;
    buckets_.assign(buckets, none);
}

// ---- the table

/// The same for both directions.
std::size_t Follower::bucket_of(const Segment& segment) const
{
    return (hash_of(segment.source) + hash_of(segment.target)) & (buckets_.size() - 1);
}

Follower::Index Follower::find(const Segment& segment) const
{
    for (Index index = buckets_[bucket_of(segment)]; index != none; index = all_[index].next) {
        const Followed& f = all_[index];
        if (f.family == segment.family && ((f.client == segment.source && f.server == segment.target) ||
                                           (f.client == segment.target && f.server == segment.source)))
            return index;
    }
    return none;
}

Follower::Followed& Follower::add(const Segment& segment, bool from_client)
{
    if (used_ == most_) {
        Followed& quiet = all_[oldest_];
        if (!quiet.over)
            end_at_end(quiet);
        if (!quiet.over)
            ++counts_.losses.by_place[LOSS_TABLE_FULL];
        remove(oldest_);
    }
    Index index = static_cast<Index>(all_.size());
    if (free_.empty()) {
        all_.emplace_back();
    } else {
        index = free_.back();
        free_.pop_back();
        all_[index] = Followed{};
    }
    ++used_;
    ++counts_.connections_begun;
    Followed& f = all_[index];
    f.client = from_client ? segment.source : segment.target;
    f.server = from_client ? segment.target : segment.source;
    f.family = segment.family;
    Index& bucket = buckets_[bucket_of(segment)];
    f.index = index;
    f.next = bucket;
    bucket = index;
    link_newest(index);
    f.captured_ns = now_ns_;
    if (const auto known = near_rtt_.find({without_port(f.client), without_port(f.server)}); known != near_rtt_.end())
        f.shift_ns = known->second / 2;
    f.now_ns = sent_at(now_ns_, f.shift_ns);
    return f;
}

void Follower::remove(Index index)
{
    const Followed& f = all_[index];
    Segment ends;
    ends.source = f.client;
    ends.target = f.server;
    Index* place = &buckets_[bucket_of(ends)];
    while (*place != index)
        place = &all_[*place].next;
    *place = f.next;
    unlink(index);
    free_.push_back(index);
    --used_;
}

void Follower::unlink(Index index)
{
    const Followed& f = all_[index];
    (f.older != none ? all_[f.older].newer : oldest_) = f.newer;
    (f.newer != none ? all_[f.newer].older : newest_) = f.older;
}

void Follower::link_newest(Index index)
{
    Followed& f = all_[index];
    f.older = newest_;
    f.newer = none;
    (newest_ != none ? all_[newest_].newer : oldest_) = index;
    newest_ = index;
}

void Follower::touch(Index index)
{
    all_[index].captured_ns = now_ns_;
    if (index == newest_)
        return;
    unlink(index);
    link_newest(index);
}

/// Of a connection whose handshake was not captured.
bool Follower::is_from_client(const Segment& segment)
{
    const bool to_server = servers_.count(segment.target) != 0;
    if (to_server != (servers_.count(segment.source) != 0))
        return to_server;
    ++gaps_.guessed;
    const std::uint32_t protocol = protocol_of(segment.first);
    if (protocol == PROTOCOL_HTTP1 || protocol == PROTOCOL_HTTP2)
        return true;
    if (segment.first == FINRACE_FOUR('H', 'T', 'T', 'P'))
        return false;
    return segment.target.port <= segment.source.port;
}

// ---- what segments mean

void Follower::take(const Segment& segment)
{
    now_ns_ = std::max(now_ns_, segment.at_ns);
    settle_due();
    release(sent_at(now_ns_, settle_ns));
    if (segment.icmp_error != 0) {
        on_icmp(segment);
        return;
    }
    const bool syn = (segment.flags & TCP_FLAG_BIT_SYN) != 0;
    if (syn && (segment.flags & TCP_FLAG_BIT_ACK) == 0) {
        begin(segment);
        return;
    }
    Index index = find(segment);
    if (index != none && all_[index].over) {
        const Followed& gone = all_[index];
        const bool another = syn ? segment.source == gone.server && segment.ack != gone.first_seq + 1
                                 : segment.payload > 0 && now_ns_ - gone.captured_ns >= forgotten_ns;
        if (!another)
            return;
        remove(index);
        index = none;
    }
    if (index == none) {
        if (syn)
            begin_by_answer(segment);
        else if (segment.payload > 0 && (segment.flags & TCP_FLAG_BIT_RST) == 0)
            adopt(segment);
        return;
    }
    touch(index);
    Followed& f = all_[index];
    if (f.gave_up) // there is no socket any more
        return;
    if (segment.source == f.client && segment.target == f.server)
        on_client(f, segment);
    else if (syn)
        on_syn_ack(f, segment);
    else
        on_server(f, segment);
}

void Follower::begin(const Segment& syn)
{
    if (const Index index = find(syn); index != none) {
        Followed& f = all_[index];
        if (f.client == syn.source && f.first_seq == syn.seq) {
            touch(index);
            if (!f.from_client) { // its answer was captured first
                f.from_client = true;
                f.last_try_ns = now_ns_;
            }
            if (f.over || f.c.state != TCP_STATE_SYN_SENT || now_ns_ - f.last_try_ns < same_packet_ns)
                return;
            ++f.retransmits;
            f.try_gap_ns = std::min(now_ns_ - f.last_try_ns, longest_gap_ns);
            f.last_try_ns = now_ns_;
            f.now_ns = std::max(f.now_ns, sent_at(now_ns_, f.shift_ns));
            return;
        }
        if (!f.over)
            end_at_end(f);
        if (!f.over)
            ++gaps_.missing; // its end
        remove(index);
    }
    Followed& f = add(syn, true);
    f.from_client = true;
    f.client_heading = syn.heading;
    f.client_hops = syn.hops;
    f.syn_ns = now_ns_;
    f.last_try_ns = now_ns_;
    f.first_seq = syn.seq;
    f.send_next = syn.seq + 1 + syn.payload; // TCP Fast Open (RFC 7413)
    f.acknowledged = syn.seq;
    f.knows_send = true;
    connection_start(&f.c, ++last_id_, f.now_ns, CONNECTION_CLIENT, TCP_STATE_SYN_SENT);
}

void Follower::begin_by_answer(const Segment& syn_ack)
{
    Followed& f = add(syn_ack, false);
    f.first_seq = syn_ack.ack - 1;
    f.send_next = syn_ack.ack;
    f.acknowledged = f.first_seq;
    f.knows_send = true;
    f.other_moved = true;
    connection_start(&f.c, ++last_id_, f.now_ns, CONNECTION_CLIENT, TCP_STATE_SYN_SENT);
    on_syn_ack(f, syn_ack);
}

void Follower::on_syn_ack(Followed& f, const Segment& segment)
{
    if (f.c.state != TCP_STATE_SYN_SENT || sequence_distance(f.first_seq, segment.ack) == 0 ||
        sequence_distance(f.send_next, segment.ack) > 0)
        return;
    f.syn_ack_again = f.syn_ack_ns != 0 && now_ns_ - f.syn_ack_ns >= same_packet_ns;
    if (f.syn_ack_ns != 0)
        return;
    f.syn_ack_ns = now_ns_;
    f.acknowledged = segment.ack;
    f.from_server = true;
    f.server_heading = segment.heading;
    f.server_hops = segment.hops;
    f.receive_next = f.arrived = segment.seq + 1;
    f.knows_receive = f.received_synced = true;
    if (servers_.size() < most_addresses)
        servers_.insert(f.server);
}

/// The first that is captured of it is payload, in the one direction or the other.
void Follower::adopt(const Segment& segment)
{
    const bool from_client = is_from_client(segment);
    Followed& f = add(segment, from_client);
    ++counts_.connections_adopted;
    socket_view view{};
    f.now_ns = from_client ? f.now_ns : now_ns_ + f.shift_ns;
    view.now_ns = f.now_ns;
    f.knows_receive = true;
    if (from_client) {
        f.from_client = f.knows_send = true;
        f.client_heading = segment.heading;
        f.client_hops = segment.hops;
        f.acknowledged = segment.seq;
        f.send_next = segment.seq + segment.payload;
        f.sent_bytes = segment.payload;
        f.sent_ns = f.now_ns;
        f.last_try_ns = now_ns_;
        f.receive_next = f.arrived = segment.ack;
    } else {
        f.from_server = f.received_synced = true;
        f.server_heading = segment.heading;
        f.server_hops = segment.hops;
        f.acknowledged = f.send_next = segment.ack;
        f.knows_send = (segment.flags & TCP_FLAG_BIT_ACK) != 0;
        f.receive_next = f.arrived = segment.seq + segment.payload;
        f.bytes_received = segment.payload;
        f.last_receive_ns = f.now_ns;
    }
    view.last_receive_ns = f.last_receive_ns;
    view.bytes_received = f.bytes_received;
    view.send_next = f.send_next;
    view.acknowledged = f.acknowledged;
    connection_adopt(&f.c, ++last_id_, &view, f.sent_ns, CONNECTION_CLIENT, TCP_STATE_ESTABLISHED);
    if (from_client)
        connection_recognise(&f.c, segment.first);
    if ((segment.flags & TCP_FLAG_BIT_FIN) == 0)
        return;
    if (from_client)
        on_client(f, segment);
    else
        on_server(f, segment);
}

namespace {

template <typename Followed>
socket_view view_of(const Followed& f, std::uint32_t acknowledged)
{
    socket_view view{};
    view.now_ns = f.now_ns;
    view.last_receive_ns = f.last_receive_ns;
    view.bytes_received = f.bytes_received;
    view.send_next = f.send_next;
    view.acknowledged = acknowledged;
    view.retransmits = f.retransmits;
    return view;
}

template <typename Followed>
socket_view view_of(const Followed& f)
{
    return view_of(f, f.acknowledged);
}

} // namespace

void Follower::on_client(Followed& f, const Segment& segment)
{
    f.from_client = true;
    if (f.client_heading == Heading::unknown) {
        f.client_heading = segment.heading;
        f.client_hops = segment.hops;
    }
    const bool reset = (segment.flags & TCP_FLAG_BIT_RST) != 0;
    if (f.c.state == TCP_STATE_SYN_SENT) {
        // An RST answers a stranger's ACK here, and the SYN goes on (RFC 9293 3.10.7.3).
        if (reset || (segment.flags & TCP_FLAG_BIT_ACK) == 0)
            return;
        if (!f.knows_receive) {
            f.receive_next = f.arrived = segment.ack;
            f.knows_receive = true;
            f.other_moved = true;
        }
        open(f);
    }
    note_place(f);
    if (f.knows_send && !reset && !has(f.c, CONNECTION_LOCAL_FIN) && sequence_distance(f.send_next, segment.seq) > 0)
        note_sent_unseen(f, segment.seq);
    if ((segment.flags & TCP_FLAG_BIT_ACK) != 0)
        on_client_ack(f, segment.ack);
    f.now_ns = std::max(f.now_ns, sent_at(now_ns_, f.shift_ns));
    if (segment.payload > 0)
        on_client_payload(f, segment);
    else if (!reset && segment.seq + 1 == f.send_next && !has(f.c, CONNECTION_LOCAL_FIN))
        f.probe_ns = now_ns_; // RFC 9293 3.8.4
    const std::uint8_t before = f.c.state;
    if (reset) {
        // Unanswered probes end in an RST of the kernel's own (tcp_keepalive_timer()). A bare one where nothing was
        // closed is from no socket: the kernel had given it up. After a close it is kept until all is acknowledged.
        const bool silent_probe = f.probe_ns != 0 && now_ns_ - f.probe_ns >= probe_answer_ns;
        const bool gone = (segment.flags & TCP_FLAG_BIT_ACK) == 0 && f.retransmits > 0 &&
                          connection_all_unacked(&f.c, f.send_next, f.acknowledged) != 0;
        if ((silent_probe || gone) && !has(f.c, CONNECTION_LOCAL_FIN | CONNECTION_PEER_FIN)) {
            f.gave_up = true;
        } else {
            note_local_close(f, CONNECTION_LOCAL_RESET);
            emit(f, EVENT_LOCAL_RESET, before);
        }
        settle_later(f);
    } else if ((segment.flags & TCP_FLAG_BIT_FIN) != 0 && !has(f.c, CONNECTION_LOCAL_FIN)) {
        note_local_close(f, CONNECTION_LOCAL_FIN);
        f.fin_sent_seq = segment.seq + segment.payload;
        f.c.state = has(f.c, CONNECTION_PEER_FIN) ? TCP_STATE_LAST_ACK : TCP_STATE_FIN_WAIT1;
        emit(f, EVENT_LOCAL_FIN, before);
        if (has(f.c, CONNECTION_PEER_FIN))
            settle_later(f);
    }
}

/// What it acknowledges, its socket had processed before it sent the segment.
void Follower::on_client_ack(Followed& f, std::uint32_t ack)
{
    const bool fin = f.fin_seen && ack == f.fin_seq + 1;
    const std::uint32_t upto = fin ? f.fin_seq : ack;
    if (!f.received_synced && f.arrived != upto) { // adopted: what has been under way is not known
        const std::uint32_t more = sequence_distance(f.receive_next, upto);
        if (more == 0 || more > most_apart)
            return;
        f.arrived = upto;
        f.last_receive_ns = std::max(f.now_ns, sent_at(now_ns_, f.shift_ns));
        f.other_moved = true;
    } else if (const std::uint32_t unseen = sequence_distance(f.arrived, upto); unseen > 0) {
        if (unseen > most_apart)
            return;
        f.arrived = upto;
        if (sequence_distance(f.arrived, f.ahead_end) > 0 && sequence_distance(f.arrived, f.ahead_begin) == 0)
            f.arrived = f.ahead_end;
        f.tail_unseen = f.arrived == upto;
        f.last_receive_ns = std::max(f.now_ns, sent_at(now_ns_, f.shift_ns));
        f.other_moved = true;
        note_missing(f);
    }
    process_received(f, upto);
    if (fin)
        process_fin(f);
}

void Follower::process_received(Followed& f, std::uint32_t upto)
{
    const std::uint32_t more = sequence_distance(f.receive_next, upto);
    if (more > 0) {
        f.bytes_received += more;
        f.receive_next = upto;
    }
    std::uint8_t done = 0;
    while (done < f.marked && sequence_distance(f.receive_next, f.marks[done].end) == 0)
        f.last_receive_ns = std::max(f.last_receive_ns, f.marks[done++].at_ns);
    if (done > 0) {
        std::copy(f.marks.begin() + done, f.marks.begin() + f.marked, f.marks.begin());
        f.marked = static_cast<std::uint8_t>(f.marked - done);
    }
}

void Follower::process_fin(Followed& f)
{
    if (has(f.c, CONNECTION_PEER_FIN))
        return;
    process_received(f, f.fin_seq);
    f.now_ns = std::max(f.now_ns, f.fin_ns);
    const std::uint8_t before = f.c.state;
    f.c.state = has(f.c, CONNECTION_LOCAL_FIN) ? TCP_STATE_CLOSING : TCP_STATE_CLOSE_WAIT;
    if (f.request_unseen && connection_awaits_response(&f.c, f.bytes_received) != 0) {
        connection_missed_fin(&f.c); // which of them was first is not known
    } else {
        const socket_view view = view_of(f, f.fin_ack);
        connection_peer_fin(&f.c, &view);
        emit(f, EVENT_PEER_FIN, before, f.fin_ack);
    }
    if (has(f.c, CONNECTION_LOCAL_FIN))
        settle_later(f);
}

/// What it sends next says that it had sent so much before.
void Follower::note_sent_unseen(Followed& f, std::uint32_t upto)
{
    const std::uint32_t unseen = sequence_distance(f.send_next, upto);
    if (unseen > most_apart)
        return;
    f.now_ns = std::max(f.now_ns, sent_at(now_ns_, f.shift_ns));
    const socket_view view = view_of(f);
    connection_notable_send(&f.c, &view, 0, unseen);
    f.hole_begin = f.send_next;
    f.hole_end = f.send_next = upto;
    f.hole_ns = now_ns_;
    f.request_unseen = true;
    f.sent_bytes += unseen;
    f.sent_ns = f.now_ns;
}

void Follower::on_client_payload(Followed& f, const Segment& segment)
{
    const std::uint32_t end = segment.seq + segment.payload;
    if (!f.knows_send) {
        f.send_next = f.acknowledged = segment.seq;
        f.knows_send = true;
    }
    const std::uint32_t fresh = sequence_distance(f.send_next, end);
    if (fresh > most_apart || has(f.c, CONNECTION_LOCAL_FIN))
        return;
    if (fresh == 0) {
        if (f.hole_begin != f.hole_end && sequence_distance(segment.seq, f.hole_begin + 1) > 0 &&
            sequence_distance(f.hole_begin, end) > 0) {
            f.hole_begin = f.hole_end; // it has come another way, or again
            if (now_ns_ - f.hole_ns < retransmission_ns)
                f.request_unseen = false;
            return;
        }
        if (now_ns_ - f.last_try_ns < same_packet_ns)
            return;
        ++f.retransmits;
        ++f.tries_unanswered;
        f.try_gap_ns = std::min(now_ns_ - f.last_try_ns, longest_gap_ns);
        f.last_try_ns = now_ns_;
        f.sample_ns = 0; // Karn: RFC 6298 3
        return;
    }
    const std::uint64_t reset_ns = std::max(f.reset_with_ack_ns, f.bare_reset_ns);
    const bool begins = connection_begins_exchange(&f.c, f.bytes_received) != 0;
    bool after_loss = false; // this may have been sent, and lost, before
    // An RST that had come to it would have ended it: this one was lost after it was captured.
    if (begins && has(f.c, waiting_resets) && f.now_ns > reset_ns + f.shift_ns / 4 + jitter_ns) {
        connection_forget_resets(&f.c);
        after_loss = f.now_ns > reset_ns + retransmission_ns;
    }
    // A FIN that had come to it would be acknowledged.
    if (begins && f.fin_whole && !has(f.c, CONNECTION_PEER_FIN) && f.now_ns > f.fin_ns + retransmission_ns)
        after_loss = true;
    const std::uint32_t exchange = f.c.exchange;
    const socket_view view = view_of(f);
    connection_notable_send(&f.c, &view, segment.seq == f.send_next ? segment.first : 0, fresh);
    f.request_unseen = after_loss || (f.request_unseen && f.c.exchange == exchange);
    const std::uint32_t begin = f.send_next;
    f.sent_bytes += fresh;
    f.send_next = end;
    f.sent_ns = f.now_ns;
    f.last_try_ns = now_ns_;
    f.try_gap_ns = 0;
    if (f.sample_ns == 0) {
        f.sample_ns = now_ns_;
        f.sample_end = end;
    }
    if (connection_requests_after_fin(&f.c, begin, fresh))
        emit(f, EVENT_SENT_AFTER_FIN, f.c.state);
}

void Follower::on_server(Followed& f, const Segment& segment)
{
    f.from_server = true;
    if (f.server_heading == Heading::unknown) {
        f.server_heading = segment.heading;
        f.server_hops = segment.hops;
    }
    if ((segment.flags & TCP_FLAG_BIT_RST) != 0) {
        on_reset(f, segment);
        return;
    }
    if (f.c.state == TCP_STATE_SYN_SENT) // of an earlier connection, or the client's ACK was not captured
        return;
    note_place(f);
    f.tries_unanswered = 0;
    f.probe_ns = 0;
    if ((segment.flags & TCP_FLAG_BIT_ACK) != 0)
        on_server_ack(f, segment);
    if (segment.payload > 0)
        on_server_payload(f, segment);
    const std::uint32_t end = segment.seq + segment.payload;
    if ((segment.flags & TCP_FLAG_BIT_FIN) != 0 && !f.fin_seen && sequence_distance(end, f.receive_next) == 0) {
        if (!f.received_synced)
            f.arrived = f.receive_next = end;
        f.received_synced = true;
        f.fin_seen = true;
        f.fin_seq = end;
        f.fin_ack = f.acknowledged;
        f.fin_ns = now_ns_ + f.shift_ns;
    }
    // Behind a hole it waits, and what came meanwhile has been acknowledged before it.
    if (f.fin_seen && !f.fin_whole && f.arrived == f.fin_seq) {
        f.fin_whole = true;
        f.fin_ack = f.acknowledged;
        f.fin_ns = now_ns_ + f.shift_ns;
    }
}

void Follower::on_server_ack(Followed& f, const Segment& segment)
{
    const bool of_fin = has(f.c, CONNECTION_LOCAL_FIN) && segment.ack == f.fin_sent_seq + 1;
    const std::uint32_t ack = of_fin ? f.fin_sent_seq : segment.ack;
    if (!f.knows_send) {
        f.send_next = f.acknowledged = ack;
        f.knows_send = true;
        return;
    }
    const std::uint32_t unseen = sequence_distance(f.send_next, ack);
    if (unseen > most_apart)
        return;
    if (unseen > 0) {
        f.send_next = ack;
        f.sent_bytes += unseen;
        f.other_moved = true;
        note_missing(f);
    }
    if (f.hole_begin != f.hole_end && sequence_distance(f.hole_begin, ack) > 0) {
        f.hole_begin = f.hole_end;
        note_missing(f);
    }
    if (sequence_distance(f.acknowledged, ack) == 0)
        return;
    f.acknowledged = ack;
    if (f.sample_ns != 0 && sequence_distance(ack, f.sample_end) == 0) {
        const std::uint64_t round_trip = now_ns_ - f.sample_ns + 2 * f.shift_ns;
        f.srtt_ns = f.srtt_ns == 0 ? round_trip : f.srtt_ns - f.srtt_ns / 8 + round_trip / 8; // RFC 6298 2.3
        f.sample_ns = 0;
    }
}

void Follower::on_server_payload(Followed& f, const Segment& segment)
{
    std::uint32_t end = segment.seq + segment.payload;
    if (!f.received_synced) {
        if (sequence_distance(f.arrived, segment.seq) > 0)
            f.arrived = f.receive_next = segment.seq;
        f.received_synced = true;
    }
    const std::uint32_t fresh = sequence_distance(f.arrived, end);
    if (fresh == 0 || fresh > most_apart)
        return;
    if (sequence_distance(f.arrived, segment.seq) > 0) {
        const bool empty = sequence_distance(f.arrived, f.ahead_end) == 0;
        if (empty)
            f.ahead_begin = segment.seq;
        if (empty || segment.seq == f.ahead_end)
            f.ahead_end = end;
        return;
    }
    if (sequence_distance(end, f.ahead_begin) == 0 && sequence_distance(end, f.ahead_end) > 0)
        end = f.ahead_end;
    f.arrived = end;
    f.tail_unseen = false;
    if (f.marked == f.marks.size())
        --f.marked;
    f.marks[f.marked++] = {.end = end, .at_ns = now_ns_ + f.shift_ns};
}

/// Of the server. Whatever the client sent that is captured later was sent before this came to it.
void Follower::on_reset(Followed& f, const Segment& segment)
{
    const reset_segment reset{.seq = segment.seq,
                              .ack = segment.ack,
                              .receive_next = f.fin_whole ? f.fin_seq + 1 : f.arrived,
                              .flags = segment.flags,
                              .seen = 1};
    if (f.c.state == TCP_STATE_SYN_SENT) {
        f.now_ns = std::max(f.now_ns, now_ns_ + f.shift_ns);
        const socket_view view = view_of(f);
        if (!connection_accepts_reset(&f.c, &view, &reset, TCP_STATE_SYN_SENT))
            return;
        connection_peer_reset(&f.c, &view, &reset);
        fail_to_open(f);
        return;
    }
    note_place(f);
    const std::uint32_t noted = f.c.flags;
    const std::uint32_t with_ack = f.c.waiting.seq;
    const std::uint32_t bare = f.c.waiting_bare_reset;
    connection_note_reset(&f.c, &reset);
    if ((reset.flags & TCP_FLAG_BIT_ACK) != 0) {
        if ((noted & CONNECTION_RESET_WITH_ACK_WAITS) == 0 || f.c.waiting.seq != with_ack)
            f.reset_with_ack_ns = now_ns_ + f.shift_ns;
    } else if ((noted & CONNECTION_BARE_RESET_WAITS) == 0 || f.c.waiting_bare_reset != bare) {
        f.bare_reset_ns = now_ns_ + f.shift_ns;
    }
    settle_later(f);
}

/// It answers a SYN. What is open outlives it (RFC 5927 6.1).
void Follower::on_icmp(const Segment& quoted)
{
    const Index index = find(quoted);
    if (index == none)
        return;
    Followed& f = all_[index];
    if (f.over || f.c.state != TCP_STATE_SYN_SENT || f.from_server || f.client != quoted.source ||
        f.first_seq != quoted.seq)
        return;
    touch(index);
    f.now_ns = std::max(f.now_ns, now_ns_ + f.shift_ns);
    f.icmp_error = quoted.icmp_error;
    fail_to_open(f);
}

void Follower::fail_to_open(Followed& f)
{
    f.c.state = TCP_STATE_CLOSE;
    emit(f, EVENT_OPEN_FAILED, TCP_STATE_SYN_SENT);
    f.over = true;
}

void Follower::open(Followed& f)
{
    note_round_trip(f);
    f.now_ns = f.syn_ack_ns != 0 ? f.syn_ack_ns + f.shift_ns : sent_at(now_ns_, f.shift_ns);
    connection_established(&f.c, f.now_ns);
    if (f.acknowledged == f.first_seq)
        ++f.acknowledged;
    f.c.state = TCP_STATE_ESTABLISHED;
    emit(f, EVENT_OPENED, TCP_STATE_SYN_SENT);
}

void Follower::note_local_close(Followed& f, std::uint32_t how)
{
    if (f.tail_unseen && !f.fin_seen && !has(f.c, CONNECTION_PEER_FIN))
        connection_missed_fin(&f.c);
    const socket_view view = view_of(f);
    connection_local_close(&f.c, &view, how);
}

void Follower::note_missing(Followed& f)
{
    if (!f.from_client || !f.from_server)
        return;
    ++gaps_.missing;
    connection_note_lost_event(&f.c, EVENT_STATE);
}

// ---- ends

void Follower::settle_later(Followed& f)
{
    if (f.settles)
        return;
    f.settles = true;
    due_.push_back({.at_ns = now_ns_ + settle_ns, .index = f.index, .id = f.c.id});
}

void Follower::settle_due()
{
    while (!due_.empty() && due_.front().at_ns <= now_ns_) {
        const Due due = due_.front();
        due_.pop_front();
        Followed& f = all_[due.index];
        if (f.c.id != due.id || f.over)
            continue;
        f.settles = false;
        settle(f);
    }
}

/// No more can come that was sent before the close was known.
void Follower::settle(Followed& f)
{
    connection& c = f.c;
    if (has(c, waiting_resets) && !has(c, CONNECTION_LOCAL_RESET)) {
        if (f.fin_whole)
            process_fin(f);
        process_received(f, f.arrived);
        const std::uint32_t next = f.receive_next + (has(c, CONNECTION_PEER_FIN) ? 1 : 0);
        socket_view view = view_of(f);
        reset_segment reset{};
        if (connection_find_reset(&c, &view, c.state, next, &reset)) {
            const bool with_ack = (reset.flags & TCP_FLAG_BIT_ACK) != 0;
            f.now_ns = std::max(f.now_ns, with_ack ? f.reset_with_ack_ns : f.bare_reset_ns);
            view.now_ns = f.now_ns;
            if (f.request_unseen && connection_awaits_response(&c, f.bytes_received) != 0)
                connection_missed_fin(&c); // which of them was first is not known
            connection_peer_reset(&c, &view, &reset);
            emit(f, EVENT_PEER_RESET, c.state);
        }
    }
    constexpr std::uint32_t both = CONNECTION_PEER_FIN | CONNECTION_LOCAL_FIN;
    if (f.gave_up || has(c, CONNECTION_PEER_RESET | CONNECTION_LOCAL_RESET) || (c.flags & both) == both)
        close(f);
}

/// Nothing more will be known of it, though it may still be open.
void Follower::end_at_end(Followed& f)
{
    if (f.c.state == TCP_STATE_SYN_SENT) {
        // The next SYN was due.
        const std::uint64_t gap_ns = std::max(2 * f.try_gap_ns, first_syn_gap_ns);
        if (!f.from_server && !f.other_moved && now_ns_ - f.last_try_ns >= gap_ns + gap_ns / 4)
            fail_to_open(f);
        return;
    }
    if (f.fin_whole && !has(f.c, CONNECTION_LOCAL_RESET))
        process_fin(f);
    settle(f);
    if (f.over || has(f.c, CONNECTION_PEER_FIN))
        return;
    const std::uint64_t quiet_ns = now_ns_ - f.captured_ns;
    if (has(f.c, CONNECTION_LOCAL_FIN)) {
        // What it waits for, if it does, does not come.
        if (quiet_ns >= settle_ns)
            close(f);
        return;
    }
    // The next retransmission was due.
    if (f.tries_unanswered > 0 && now_ns_ - f.last_try_ns >= 5 * f.try_gap_ns / 2) {
        f.now_ns = std::max(f.now_ns, sent_at(f.last_try_ns + 2 * f.try_gap_ns, f.shift_ns));
        f.gave_up = true;
        close(f);
    }
}

void Follower::close(Followed& f)
{
    const std::uint8_t before = f.c.state;
    f.c.state = TCP_STATE_CLOSE;
    emit(f, EVENT_CLOSED, before);
    f.over = true;
    if (!(f.from_client && f.from_server))
        ++gaps_.one_direction;
}

void Follower::finish()
{
    for (Index index = oldest_; index != none; index = all_[index].newer) {
        Followed& f = all_[index];
        if (f.over)
            continue;
        end_at_end(f);
        if (!f.over && f.other_moved && !(f.from_client && f.from_server))
            ++gaps_.one_direction;
    }
    release(~std::uint64_t{0});
}

void Follower::release(std::uint64_t until_ns)
{
    while (!held_.empty() && (held_.begin()->first <= until_ns || held_.size() > most_held)) {
        emit_(held_.begin()->second);
        held_.erase(held_.begin());
    }
}

void Follower::emit(const Followed& f, std::uint8_t kind, std::uint8_t old_state, std::uint32_t acknowledged)
{
    if (kind != EVENT_OPEN_FAILED && !(f.from_client && f.from_server))
        return;
    const socket_view view = view_of(f, acknowledged);
    event e{};
    e.timestamp_ns = view.now_ns;
    e.bytes_sent = f.sent_bytes - std::min<std::uint64_t>(f.sent_bytes, sequence_distance(acknowledged, f.send_next));
    e.bytes_received = view.bytes_received;
    e.response_bytes = connection_response_bytes(&f.c, view.bytes_received);
    e.request_bytes = connection_request_bytes(&f.c, view.send_next);
    e.unacked_bytes = connection_unacked_bytes(&f.c, view.send_next, acknowledged);
    std::memcpy(e.local_address, f.client.address.data(), sizeof(e.local_address));
    std::memcpy(e.peer_address, f.server.address.data(), sizeof(e.peer_address));
    e.local_port = f.client.port;
    e.peer_port = f.server.port;
    e.family = f.family;
    e.kind = kind;
    e.old_state = old_state;
    e.new_state = f.c.state;
    e.observed = OBSERVED_RESET_HEADER | OBSERVED_WIRE;
    if (f.icmp_error != 0) {
        e.observed |= OBSERVED_SOCKET_ERROR;
        e.socket_error = f.icmp_error;
    }
    e.srtt_us = static_cast<std::uint32_t>(std::min<std::uint64_t>(f.srtt_ns / 1000, ~std::uint32_t{0}));
    e.retransmits = view.retransmits;
    e.version = FINRACE_EVENT_VERSION;
    e.sent_ns = f.sent_ns;
    e.received_ns = f.last_receive_ns;
    e.connection = f.c;
    // What waits there until then is no time and no count.
    if (!has(f.c, CONNECTION_PEER_RESET)) {
        e.connection.peer_reset_ns = 0;
        e.connection.reset_unacked = 0;
    }
    held_.emplace_hint(held_.end(), e.timestamp_ns, e);
}

// ---- where it was taken

void Follower::note_round_trip(Followed& f)
{
    if (f.syn_ns == 0 || f.syn_ack_ns == 0 || f.syn_ack_again || f.retransmits > 0)
        return;
    const std::uint64_t near_ns = now_ns_ - f.syn_ack_ns;
    if (near_ns > longest_round_trip_ns)
        return;
    const std::pair ends{without_port(f.client), without_port(f.server)};
    auto known = near_rtt_.find(ends);
    if (known == near_rtt_.end() && near_rtt_.size() < most_addresses)
        known = near_rtt_.emplace(ends, near_ns).first;
    // An ACK that waits for the first request is late: the least is nearest to the truth.
    if (known != near_rtt_.end())
        known->second = std::min(known->second, near_ns);
    const std::uint64_t least_ns = known != near_rtt_.end() ? known->second : near_ns;
    f.shift_ns = least_ns / 2;
    f.srtt_ns = f.syn_ack_ns - f.syn_ns + least_ns;
}

TakenAt Follower::place_by_time(const Followed& f) const
{
    using Place = TakenAt;
    if (f.syn_ns == 0 || f.syn_ack_ns == 0 || f.syn_ack_again || f.retransmits > 0)
        return Place::unknown;
    const std::uint64_t far_ns = f.syn_ack_ns - f.syn_ns;
    const std::uint64_t near_ns = 2 * f.shift_ns;
    if (far_ns + near_ns < by_time_ns)
        return Place::unknown;
    if (near_ns * times_nearer <= far_ns)
        return Place::client;
    if (far_ns * times_nearer <= near_ns)
        return Place::server;
    return far_ns + near_ns >= ns_per_ms ? Place::between : Place::unknown;
}

/// Once for each connection, as soon as both directions have been met.
void Follower::note_place(Followed& f)
{
    using Place = TakenAt;
    if (f.placed || !f.from_client || !f.from_server)
        return;
    f.placed = true;
    Place place = Place::unknown;
    if (f.client.address == f.server.address) {
        place = Place::both; // met once, inwards, on Linux's loopback device
        ++by_heading_;
    } else if (f.client_heading != Heading::unknown && f.server_heading != Heading::unknown) {
        const bool leaves = f.client_heading == Heading::outwards;
        const bool answer_leaves = f.server_heading == Heading::outwards;
        place =
            leaves ? (answer_leaves ? Place::both : Place::client) : (answer_leaves ? Place::server : Place::between);
        ++by_heading_;
    } else if (place = place_by_time(f); place != Place::unknown) {
        ++by_time_;
    } else if ((f.client_hops == 0) != (f.server_hops == 0)) {
        place = f.client_hops == 0 ? Place::client : Place::server;
    }
    switch (place) {
    case Place::client:
        ++votes_.clients;
        break;
    case Place::server:
        ++votes_.servers;
        break;
    case Place::both:
        ++votes_.boths;
        break;
    case Place::between:
        ++votes_.betweens;
        break;
    case Place::unknown:
    case Place::mixed:
        break;
    }
    if (place != Place::client && place != Place::server)
        return;
    const Endpoint host = without_port(place == Place::client ? f.client : f.server);
    if (const auto known = near_.find(host); known != near_.end())
        ++known->second.near;
    else if (near_.size() < most_addresses)
        near_.emplace(host, Votes{.near = 1, .family = f.family});
}

Vantage Follower::vantage() const
{
    using Place = TakenAt;
    Vantage vantage = votes_;
    // What a host speaks with itself says nothing of where it is to others.
    const std::uint64_t apart = vantage.clients + vantage.servers + vantage.betweens;
    const std::uint64_t all = apart > 0 ? apart : vantage.boths;
    const auto most = [all](std::uint64_t votes) { return votes > 0 && votes * 100 >= all * most_agree_percent; };
    vantage.place = most(vantage.clients)                     ? Place::client
                    : most(vantage.servers)                   ? Place::server
                    : apart == 0 && most(vantage.boths)       ? Place::both
                    : most(vantage.betweens)                  ? Place::between
                    : most(vantage.clients + vantage.servers) ? Place::mixed
                                                              : Place::unknown;
    vantage.sure = by_heading_ > 0 || by_time_ >= votes_for_sure;
    const auto host = std::max_element(near_.begin(), near_.end(), [](const auto& one, const auto& other) {
        return one.second.near < other.second.near;
    });
    if (host != near_.end() && host->second.near * 100 >= (vantage.clients + vantage.servers) * most_agree_percent) {
        vantage.host = host->first;
        vantage.family = host->second.family;
    }
    return vantage;
}

} // namespace finrace
