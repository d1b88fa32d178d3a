// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/timeline.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "core/cause.h"
#include "sink/facts.h"

namespace finrace {

namespace {

constexpr std::string_view to_peer = "──▶";
constexpr std::string_view to_local = "◀──";
constexpr std::string_view no_segment = " · ";

bool has(const connection& c, std::uint32_t flags)
{
    return (c.flags & flags) != 0;
}

struct Moment {
    double ms; ///< relative to the request, or to the SYN
    bool whole_ms;
    std::string_view arrow;
    std::string what;
    std::string shows;
};

std::string bytes_text(std::uint64_t bytes)
{
    return fmt::format("{} byte{}", bytes, bytes == 1 ? "" : "s");
}

std::string acknowledged_text(std::uint32_t unacked, std::uint32_t request)
{
    const std::uint32_t acknowledged = request - std::min(unacked, request);
    return acknowledged == request ? fmt::format("acknowledges all {} request bytes", request)
                                   : fmt::format("acknowledges {} of {} request bytes", acknowledged, request);
}

/// One sighting's facts, and the moments that they make.
class Story {
public:
    explicit Story(const Sighting& sighting)
        // A later exchange on the same connection has another request: then the verdict's event is all there is.
        : e_(sighting.last.connection.exchange == sighting.judged.connection.exchange ? sighting.last
                                                                                      : sighting.judged),
          c_(e_.connection), timeout_(sighting.idle_timeout),
          request_bytes_(std::max(sighting.judged.request_bytes, e_.request_bytes)),
          opening_(sighting.judged.kind == EVENT_OPEN_FAILED),
          met_silence_(
              (sighting.verdict.cause == Cause::path_dropped || sighting.verdict.cause == Cause::accept_stalled) &&
              sighting.verdict.variant != Variant::unanswered_probes),
          zero_ns_(opening_ ? c_.opened_ns : c_.request_ns)
    {
        if (!is_client(e_)) {
            zero_ns_ = e_.timestamp_ns;
            tell_server();
            return;
        }
        if (opening_) {
            tell_opening(sighting);
        } else if (c_.exchange > 0) {
            tell_request();
            tell_response();
        }
        tell_fin();
        tell_reset();
        tell_local_close();
        sort();
    }

    [[nodiscard]] const std::vector<Moment>& moments() const { return moments_; }

private:
    void sort()
    {
        std::stable_sort(moments_.begin(), moments_.end(),
                         [](const Moment& a, const Moment& b) { return a.ms < b.ms; });
    }

    void add(std::uint64_t at_ns, std::string_view arrow, std::string what, std::string shows)
    {
        if (at_ns != 0 && zero_ns_ != 0)
            moments_.push_back({.ms = milliseconds_between(zero_ns_, at_ns),
                                .whole_ms = false,
                                .arrow = arrow,
                                .what = std::move(what),
                                .shows = std::move(shows)});
    }

    /// What this host's server did, and what met it.
    void tell_server()
    {
        const bool late = e_.kind == EVENT_SEGMENT_AFTER_CLOSE;
        add(e_.sent_ns, to_peer, "answer",
            e_.unacked_bytes > 0 ? bytes_text(e_.unacked_bytes) + " unacknowledged" : "");
        add(e_.received_ns, to_local, "request", late ? "" : bytes_text(e_.unread_bytes) + " unread");
        tell_local_close();
        if (late)
            add(e_.timestamp_ns, to_local, "request", bytes_text(e_.segment_bytes) + ", after the close");
        sort();
    }

    void tell_opening(const Sighting& sighting)
    {
        add(c_.opened_ns, to_peer, "SYN",
            e_.retransmits == 0 ? std::string() : fmt::format("and {} more, unanswered", e_.retransmits));
        if (has(c_, CONNECTION_PEER_RESET))
            return;
        const bool known = (e_.observed & OBSERVED_SOCKET_ERROR) != 0 && e_.socket_error != 0;
        add(e_.timestamp_ns, no_segment, sighting.verdict.variant == Variant::gave_up ? "gave up" : "failed",
            known ? error_name(e_.socket_error) : std::string());
    }

    void tell_request()
    {
        const bool adopted = has(c_, CONNECTION_ADOPTED_IN_EXCHANGE);
        if (!adopted && (is_reused(c_) || c_.idle_ms > 0)) {
            std::string known = "from here";
            if (timeout_)
                known += fmt::format("; this upstream closes after {} ms ({} closes, spread {} ms)", timeout_->ms,
                                     timeout_->samples, timeout_->spread_ms());
            moments_.push_back({.ms = -static_cast<double>(c_.idle_ms),
                                .whole_ms = true,
                                .arrow = no_segment,
                                .what = is_reused(c_) ? "idle" : "opened",
                                .shows = std::move(known)});
        }
        std::string size = request_bytes_ > 0 ? bytes_text(request_bytes_) : std::string();
        if (adopted)
            size = "under way when finrace started";
        else if (has(c_, CONNECTION_SENT_AFTER_FIN))
            size += size.empty() ? "sent after the FIN had come" : ", sent after the FIN had come";
        else if (met_silence_)
            size += fmt::format(", none acknowledged; {} retransmissions on this connection", e_.retransmits);
        add(c_.request_ns, to_peer, "request", std::move(size));
    }

    void tell_response()
    {
        const std::uint64_t end_ns = has(c_, CONNECTION_PEER_FIN) ? c_.peer_fin_ns : c_.peer_reset_ns;
        if (e_.response_bytes == 0 || end_ns == 0)
            return;
        const std::uint64_t last_ns = end_ns - std::uint64_t{c_.fin_idle_ms} * 1'000'000;
        add(last_ns, to_local, "response", fmt::format("{}, then silence", bytes_text(e_.response_bytes)));
    }

    void tell_fin()
    {
        if (!has(c_, CONNECTION_PEER_FIN))
            return;
        std::string shows;
        if (c_.exchange > 0 && !has(c_, CONNECTION_SENT_AFTER_FIN | CONNECTION_LOCAL_FIRST) && request_bytes_ > 0) {
            shows = acknowledged_text(c_.fin_unacked, request_bytes_);
            if (c_.fin_unacked >= request_bytes_)
                shows += ": sent before the request arrived";
            else if (c_.fin_unacked == 0 && e_.response_bytes == 0)
                shows += ", answers none";
        }
        add(c_.peer_fin_ns, to_local, "FIN", std::move(shows));
    }

    void tell_reset()
    {
        if (!has(c_, CONNECTION_PEER_RESET))
            return;
        std::string shows;
        if (opening_)
            shows = "refuses the SYN";
        else if (has(c_, CONNECTION_RESET_FLAGS_UNKNOWN) || (e_.observed & OBSERVED_RESET_HEADER) == 0)
            shows = "its header could not be seen";
        else if (has(c_, CONNECTION_RESET_HAS_ACK))
            shows = request_bytes_ > 0
                        ? acknowledged_text(c_.reset_unacked, request_bytes_) + ": the upstream's socket still existed"
                        : "with ACK: the upstream's socket still existed";
        else if (has(c_, CONNECTION_RESET_AT_FIN))
            shows = "its number is the FIN's: answers what was sent before the FIN came";
        else if (has(c_, CONNECTION_RESET_BEYOND_FIN))
            shows = "its number follows the FIN's: answers what was sent after it";
        else
            shows = "without ACK: the upstream's socket was gone";
        add(c_.peer_reset_ns, to_local, "RST", std::move(shows));
    }

    void tell_local_close()
    {
        if (kernel_gave_up(e_))
            add(e_.timestamp_ns, no_segment, "gave up",
                e_.socket_error != 0 ? error_name(e_.socket_error) : std::string());
        else if (has(c_, CONNECTION_LOCAL_FIN))
            add(c_.local_close_ns, to_peer, "FIN", "this host closes");
        else if (has(c_, CONNECTION_LOCAL_RESET))
            add(c_.local_close_ns, to_peer, "RST", "this host resets");
    }

    const event& e_;
    const connection& c_;
    const std::optional<IdleTimeout>& timeout_;
    std::uint32_t request_bytes_;
    bool opening_;
    bool met_silence_; ///< nothing of the request was acknowledged
    std::uint64_t zero_ns_;
    std::vector<Moment> moments_;
};

std::string head(const Sighting& sighting, const WallClock& clock, const Paint& paint)
{
    const Verdict& verdict = sighting.verdict;
    const std::string certainty(to_string(verdict.certainty));
    std::string line =
        paint.dim(clock.time_of_day(sighting.judged.timestamp_ns)) + "  " + paint.red(to_string(verdict.cause));
    if (verdict.variant != Variant::none)
        line += fmt::format(" ({})", to_string(verdict.variant));
    line += "  " + (verdict.certainty == Certainty::proven ? paint.green(certainty) : paint.yellow(certainty));
    if (verdict.reason && *verdict.reason != Reason::unknown)
        line += paint.dim(fmt::format("  {}", to_string(*verdict.reason)));
    if (verdict.incomplete)
        line += paint.yellow(", incomplete");
    return line;
}

std::string whereabouts(const Sighting& sighting)
{
    const event& e = sighting.judged;
    const connection& c = e.connection;
    std::string line;
    if (c.pid != 0)
        line = fmt::format("{}[{}]  ", sighting.process_name.empty() ? "?" : printable(sighting.process_name), c.pid);
    line += fmt::format("{} {} {}", endpoint_text(e.local_address, e.local_port, e.family), is_client(e) ? "→" : "←",
                        endpoint_text(e.peer_address, e.peer_port, e.family));
    if (is_client(e) && c.exchange > 0)
        line += fmt::format("  request {} on this connection{}", c.exchange,
                            has(c, CONNECTION_ADOPTED) ? " since finrace started" : "");
    return line;
}

/// What the client got; empty if nothing is known.
std::string outcome_text(const Outcome& outcome)
{
    std::string text;
    if (const auto& retry = outcome.retry)
        text = fmt::format("Tried again {:.3f} ms later, on {}.", milliseconds_between(0, retry->after_ns),
                           endpoint_text(retry->upstream.address.data(), retry->upstream.port, retry->upstream.family));
    const auto& client = outcome.client;
    if (!client)
        return text;
    const std::string_view got = !client->answered     ? "got no answer"
                                 : client->status == 0 ? "was answered; the status can't be read"
                                                       : "got ";
    text += fmt::format("{}The client {}{} {}{}.", text.empty() ? "" : " ",
                        endpoint_text(client->address.data(), client->port, client->family),
                        client->certainty == Certainty::possible ? " (perhaps)" : "", got,
                        client->status == 0 ? std::string() : std::to_string(client->status));
    if (client->left)
        text += " It had left by then.";
    return text;
}

} // namespace

std::string timeline(const Sighting& sighting, const WallClock& clock, const Paint& paint, std::size_t width)
{
    std::string text = head(sighting, clock, paint) + "\n  " + whereabouts(sighting) + "\n";
    const bool secondary = sighting.verdict.cause == Cause::upstream_benched; // its story has been told before
    const Story story(sighting);
    for (const Moment& moment : secondary ? std::vector<Moment>{} : story.moments()) {
        const std::string time = moment.whole_ms ? fmt::format("{:>+10.0f}    ", moment.ms)
                                                 : fmt::format("{:>+14.3f}", moment.ms == 0 ? 0.0 : moment.ms);
        text += fmt::format("  {} ms  {}  ", paint.dim(time), paint.cyan(moment.arrow));
        text += moment.shows.empty() ? moment.what + "\n" : fmt::format("{:<8}  {}\n", moment.what, moment.shows);
    }
    for (const std::string& line : wrap(printable(sighting.verdict.message), width - 2))
        text += "  " + paint.bold(line) + "\n";
    for (const std::string& line : wrap(outcome_text(sighting.outcome), width - 2))
        text += "  " + line + "\n";
    return text + "\n";
}

void SightingQueue::add(Sighting sighting)
{
    if (waiting_.size() == capacity) {
        ready_.push_back(std::move(waiting_.front()));
        waiting_.pop_front();
    }
    waiting_.push_back(std::move(sighting));
}

void SightingQueue::follow(const event& e)
{
    for (Sighting& sighting : waiting_)
        if (sighting.judged.connection.id == e.connection.id)
            sighting.last = e;
}

std::vector<Sighting> SightingQueue::take_ready(std::uint64_t now_ns)
{
    const auto first_waiting = std::stable_partition(waiting_.begin(), waiting_.end(), [&](const Sighting& sighting) {
        return sighting.last.kind == EVENT_CLOSED || sighting.last.kind == EVENT_OPEN_FAILED ||
               now_ns >= sighting.judged.timestamp_ns + hold_ns;
    });
    std::move(waiting_.begin(), first_waiting, std::back_inserter(ready_));
    waiting_.erase(waiting_.begin(), first_waiting);
    return std::exchange(ready_, {});
}

std::vector<Sighting> SightingQueue::take_all()
{
    std::move(waiting_.begin(), waiting_.end(), std::back_inserter(ready_));
    waiting_.clear();
    return std::exchange(ready_, {});
}

} // namespace finrace
