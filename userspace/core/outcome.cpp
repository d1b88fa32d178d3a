// SPDX-License-Identifier: GPL-2.0-only OR MIT
//
// Seen of nine proxies by their system calls: nginx, Apache httpd, Varnish and Caddy let go of the upstream's socket
// and then answer the client or try again; HAProxy, lighttpd and Node.js may answer (or let go of) the client first.
// Varnish answers from another thread.
#include "core/outcome.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "core/flags.h"

namespace finrace {

namespace {

/// The longest that a thread may be busy with one exchange's end.
constexpr std::uint64_t turn_ns = 20'000'000;
/// A proxy that has a client's request begins its own so soon, unless something else came between.
constexpr std::uint64_t passed_on_ns = 20'000'000;
/// The longest that a turn is followed back to its beginning: its number may come again.
constexpr std::uint64_t turn_limit_ns = 200'000'000;

std::uint64_t before(std::uint64_t ns, std::uint64_t span)
{
    return ns - std::min(ns, span);
}

bool has_left(const event& e)
{
    return e.new_state == TCP_STATE_CLOSE_WAIT || e.new_state == TCP_STATE_LAST_ACK ||
           e.new_state == TCP_STATE_CLOSING || e.new_state == TCP_STATE_CLOSE;
}

/// Whether it may be what became of a lost exchange: no answer of an upstream's, and no client that waits for nothing.
bool is_bad_end(const event& e)
{
    if (e.kind == EVENT_CLIENT_ANSWERED)
        return e.http_status == 0 || e.http_status >= 400 || has_left(e);
    return e.kind == EVENT_CLIENT_RELEASED && has(e, CONNECTION_CLIENT_WAITS);
}

bool same_client(const event& a, const event& b)
{
    return a.peer_port == b.peer_port && a.netns == b.netns &&
           std::equal(std::begin(a.peer_address), std::end(a.peer_address), std::begin(b.peer_address));
}

/// When a connection's newest exchange began, its opening included. CLOCK_MONOTONIC in nanoseconds.
std::uint64_t begun(const connection& c)
{
    return c.exchange > 1 ? c.request_ns : c.opened_ns;
}

} // namespace

Client client_of(const event& e, Certainty certainty)
{
    Client client{.port = e.peer_port,
                  .family = e.family,
                  .left = has_left(e),
                  .answered = e.kind == EVENT_CLIENT_ANSWERED,
                  .status = e.http_status,
                  .certainty = certainty};
    std::copy(std::begin(e.peer_address), std::end(e.peer_address), client.address.begin());
    return client;
}

/// A failed exchange whose socket was let go of.
struct Outcomes::Loss {
    std::uint64_t connection_id;
    std::uint32_t process;
    std::uint32_t thread;
    std::uint16_t turn;
    bool by_peer;
    std::uint32_t request_bytes;
    std::uint64_t asked_ns;    ///< the request, or the SYN
    std::uint64_t begun_ns;    ///< the same, or the SYN before a connection's first request
    std::uint64_t failed_ns;   ///< the end, where it came from the peer
    std::uint64_t released_ns; ///< by the process

    [[nodiscard]] bool of_process(const event& e) const { return e.connection.pid == process; }
    /// Its thread has not slept in between.
    [[nodiscard]] bool of_turn(const event& e) const { return of_process(e) && e.thread == thread && e.turn == turn; }
    /// A client whose request came before this one was sent.
    [[nodiscard]] bool is_behind(const event& e) const
    {
        return e.kind >= EVENT_CLIENT_ANSWERED && e.connection.last_byte_ns <= asked_ns;
    }
    /// One of these that got no good answer: it may be the exchange's.
    [[nodiscard]] bool may_be_client(const event& e) const { return is_behind(e) && is_bad_end(e); }
    /// Its request came right before this one was begun.
    [[nodiscard]] bool is_right_behind(const event& e) const
    {
        return e.connection.last_byte_ns + passed_on_ns >= begun_ns;
    }
    [[nodiscard]] bool is_next_try(const event& e) const
    {
        return e.kind == EVENT_TRIED && e.connection.id != connection_id;
    }
};

/// Whether this is but more of an answer: the kernel can't tell within one tick (10 ms at most).
bool Outcomes::continues(const event& e) const
{
    constexpr std::uint64_t tick_ns = 10'000'000;

    if (e.kind != EVENT_CLIENT_ANSWERED || has(e, CONNECTION_CLIENT_WAITS))
        return false;
    return std::any_of(since(before(e.timestamp_ns, tick_ns)), noted_.end(), [&e](const event& other) {
        return other.kind == EVENT_CLIENT_ANSWERED && same_client(other, e);
    });
}

void Outcomes::note(const event& e)
{
    if (continues(e))
        return;
    while (!noted_.empty() &&
           (noted_.size() >= capacity || noted_.front().timestamp_ns + 2 * horizon_ns < e.timestamp_ns)) {
        if (noted_.front().kind == EVENT_RELEASED)
            releases_.erase(noted_.front().connection.id);
        noted_.pop_front();
    }
    // What a thread had done before it let go is told of afterwards.
    auto place = noted_.end();
    while (place != noted_.begin() && std::prev(place)->timestamp_ns > e.timestamp_ns)
        --place;
    noted_.insert(place, e);
    if (e.kind == EVENT_RELEASED)
        releases_.insert_or_assign(e.connection.id, e);
}

std::deque<event>::const_iterator Outcomes::since(std::uint64_t ns) const
{
    return std::lower_bound(noted_.begin(), noted_.end(), ns,
                            [](const event& e, std::uint64_t at) { return e.timestamp_ns < at; });
}

std::optional<Outcomes::Loss> Outcomes::find(const event& end) const
{
    const connection& c = end.connection;
    const auto found = releases_.find(c.id);
    if (found == releases_.end())
        return std::nullopt;
    const event& release = found->second;
    Loss loss{.connection_id = c.id,
              .process = release.connection.pid,
              .thread = release.thread,
              .turn = release.turn,
              .by_peer = !has(c, CONNECTION_LOCAL_FIRST),
              .request_bytes = end.request_bytes,
              .asked_ns = c.exchange > 0 ? c.request_ns : c.opened_ns,
              .begun_ns = begun(c),
              .failed_ns = end.timestamp_ns,
              .released_ns = release.timestamp_ns};
    if (has(c, CONNECTION_PEER_FIN))
        loss.failed_ns = c.peer_fin_ns;
    else if (has(c, CONNECTION_PEER_RESET))
        loss.failed_ns = c.peer_reset_ns;
    return loss;
}

/// The order of a turn is one witness, the times of the requests another: of all clients of the process that end badly
/// about then, whose came right before the exchange's. `client` is that, if none is nearer.
const event* Outcomes::nearest_client(const Loss& loss, const event& client) const
{
    const event* nearest = &client;
    for (auto e = since(before(loss.released_ns, turn_limit_ns)); e != noted_.end(); ++e)
        if (loss.of_process(*e) && loss.may_be_client(*e) && !same_client(*e, client) &&
            e->connection.last_byte_ns > nearest->connection.last_byte_ns)
            nearest = &*e;
    return nearest;
}

/// Whether another client may be this one's as well, of those that ended badly about then. The times tell them apart
/// only if each asked after the exchange before had begun.
bool Outcomes::has_rival(const Loss& loss, const event& client) const
{
    const auto about_then = since(before(loss.released_ns, turn_limit_ns));
    std::uint64_t before_ns = 0;
    for (auto e = about_then; e != noted_.end(); ++e)
        if (loss.of_process(*e) && e->kind == EVENT_RELEASED && e->connection.id != loss.connection_id)
            if (const std::uint64_t begun_ns = begun(e->connection); begun_ns <= loss.begun_ns)
                before_ns = std::max(before_ns, begun_ns);
    if (client.connection.last_byte_ns <= before_ns)
        before_ns = 0;
    return std::any_of(about_then, noted_.end(), [&](const event& e) {
        return loss.of_process(e) && loss.may_be_client(e) && !same_client(e, client) &&
               e.connection.last_byte_ns > before_ns;
    });
}

Outcome Outcomes::by_turn(const Loss& loss) const
{
    Outcome outcome;
    const auto found = [&](const event& e, bool alone) {
        const event* nearest = nearest_client(loss, e);
        const bool likely = alone && nearest == &e && loss.is_right_behind(e) && !has_rival(loss, e);
        outcome.client = client_of(*nearest, likely ? Certainty::likely : Certainty::possible);
        outcome.known = likely;
        outcome.settled = true;
        return outcome;
    };
    const auto released = since(loss.released_ns);
    const auto last = since(loss.released_ns + turn_ns);

    const event* client = nullptr;
    std::size_t clients = 0;
    const auto consider = [&](const event& e) {
        clients += client == nullptr || !same_client(*client, e) ? 1 : 0;
        // Of several, whose request came right before the exchange's.
        if (client == nullptr || e.connection.last_byte_ns > client->connection.last_byte_ns)
            client = &e;
    };

    // Several exchanges may end in one turn. Each proxy has an order of its own, and how the turn begins shows which:
    // with a client, then each release's clients are those since the release before; with a release, then those that
    // follow. Node.js has both orders, for a FIN and for an RST: then nothing is sure.
    std::optional<bool> client_first;
    std::size_t releases = 0;
    std::size_t ended = 0; // clients since the last release that had its own, whosever they are
    bool pending = false;  // a release before this one, of which nothing has come yet
    bool mixed = false;    // a release that has no client by this order
    for (auto e = since(before(loss.released_ns, turn_limit_ns)); e != released; ++e) {
        if (!loss.of_turn(*e))
            continue;
        mixed = mixed || (pending && e->kind == EVENT_RELEASED);
        pending = e->kind == EVENT_RELEASED;
        if (!pending && !is_bad_end(*e))
            continue;
        client_first = client_first.value_or(!pending);
        if (!*client_first)
            continue;
        if (!pending) {
            ++ended;
            // What a client is answered well before the loss is noticed is another's.
            if (loss.may_be_client(*e) && e->timestamp_ns + turn_ns >= loss.released_ns &&
                (!loss.by_peer || e->timestamp_ns >= loss.failed_ns))
                consider(*e);
        } else if (ended <= 1) {
            client = nullptr;
            clients = ended = releases = 0;
        } else {
            ++releases;
        }
    }
    // Clients whose upstreams are let go of afterwards, all of them: whose is whose, nothing tells.
    if (client != nullptr && ended > releases)
        return found(*client, clients == 1 && !mixed);

    client = nullptr;
    const event* tried = nullptr;
    for (auto e = released; e != last; ++e) {
        if (!loss.of_turn(*e) || e->connection.id == loss.connection_id)
            continue;
        if (e->kind == EVENT_RELEASED && tried != nullptr)
            break;
        if (tried == nullptr && client == nullptr && loss.is_next_try(*e) && repeats(loss, *e)) {
            tried = &*e;
        } else if (loss.may_be_client(*e)) {
            consider(*e);
            if (!pending)
                return found(*e, !mixed);
        }
        pending = pending || e->kind == EVENT_RELEASED || loss.is_next_try(*e); // the thread goes on, with other work
    }
    // Who is answered already does not wait for another try, whatever it looks like.
    if (client != nullptr) {
        outcome.client = client_of(*client, Certainty::possible);
    } else if (tried != nullptr) {
        outcome.retry = Retry{.connection_id = tried->connection.id,
                              .upstream = UpstreamKey::of(*tried),
                              .after_ns = tried->timestamp_ns - loss.released_ns};
        outcome.known = true;
    }
    return outcome;
}

/// The same request again has the same size, if both were written at once. A connection is opened before that.
bool Outcomes::repeats(const Loss& loss, const event& tried) const
{
    if (loss.request_bytes == 0 || tried.request_bytes != 0)
        return tried.request_bytes == loss.request_bytes;
    return std::any_of(since(tried.timestamp_ns), noted_.end(), [&](const event& e) {
        return e.kind == EVENT_TRIED && e.connection.id == tried.connection.id && e.request_bytes == loss.request_bytes;
    });
}

Outcome Outcomes::by_turn(const event& end) const
{
    const std::optional<Loss> loss = find(end);
    return loss ? by_turn(*loss) : Outcome{};
}

bool Outcomes::is_settled(const event& end, std::uint64_t now_ns) const
{
    const std::optional<Loss> loss = find(end);
    return loss && now_ns >= loss->released_ns + turn_ns && by_turn(*loss).settled;
}

Outcome Outcomes::of(const event& end) const
{
    const std::optional<Loss> loss = find(end);
    if (!loss)
        return {};
    Outcome outcome = by_turn(*loss);
    if (outcome.client)
        return outcome;
    // Whoever had been waiting since before the request, if that is one client alone.
    const event* found = nullptr;
    for (auto e = since(outcome.retry ? loss->released_ns + outcome.retry->after_ns : loss->failed_ns);
         e != noted_.end(); ++e) {
        const bool ended = is_bad_end(*e) || (outcome.retry && e->kind == EVENT_CLIENT_ANSWERED);
        if (!loss->of_process(*e) || !loss->is_behind(*e) || !ended)
            continue;
        if (found != nullptr && !same_client(*found, *e))
            return outcome;
        if (found == nullptr)
            found = &*e;
    }
    if (found != nullptr)
        outcome.client = client_of(*found, Certainty::possible);
    return outcome;
}

} // namespace finrace
