// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/story.h"

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "core/cause.h"
#include "core/flags.h"
#include "sink/facts.h"
#include "sink/text.h"

namespace finrace {

namespace {

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
    using Way = Moment::Way;
    using Left = Moment::Left;

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

    [[nodiscard]] std::vector<Moment> take() { return std::move(moments_); }

private:
    void sort()
    {
        std::stable_sort(moments_.begin(), moments_.end(),
                         [](const Moment& a, const Moment& b) { return a.ms < b.ms; });
    }

    void add(std::uint64_t at_ns, Way way, std::string what, std::string shows, Left left = Left::unknown)
    {
        if (at_ns != 0 && zero_ns_ != 0)
            moments_.push_back({.ms = milliseconds_between(zero_ns_, at_ns),
                                .rest = false,
                                .way = way,
                                .left = left,
                                .what = std::move(what),
                                .shows = std::move(shows)});
    }

    /// What this host's server did, and what met it.
    void tell_server()
    {
        const bool late = e_.kind == EVENT_SEGMENT_AFTER_CLOSE;
        add(e_.sent_ns, Way::to_peer, "answer",
            e_.unacked_bytes > 0 ? bytes_text(e_.unacked_bytes) + " unacknowledged" : "");
        add(e_.received_ns, Way::to_local, "request", late ? "" : bytes_text(e_.unread_bytes) + " unread");
        tell_local_close();
        if (late)
            add(e_.timestamp_ns, Way::to_local, "request", bytes_text(e_.segment_bytes) + ", after the close");
        sort();
    }

    void tell_opening(const Sighting& sighting)
    {
        add(c_.opened_ns, Way::to_peer, "SYN",
            e_.retransmits == 0 ? std::string() : fmt::format("and {} more, unanswered", e_.retransmits));
        if (has(c_, CONNECTION_PEER_RESET))
            return;
        const bool known = (e_.observed & OBSERVED_SOCKET_ERROR) != 0 && e_.socket_error != 0;
        add(e_.timestamp_ns, Way::none, sighting.verdict.variant == Variant::gave_up ? "gave up" : "failed",
            known ? error_name(e_.socket_error) : std::string());
    }

    void tell_request()
    {
        const bool adopted = has(c_, CONNECTION_ADOPTED_IN_EXCHANGE);
        if (!adopted && (is_reused(c_) || c_.idle_ms > 0)) {
            std::string known = "from here";
            if (timeout_ && timeout_->samples == 0)
                known += fmt::format("; this upstream closes after {} ms, as --idle-timeout says", timeout_->ms);
            else if (timeout_)
                known += fmt::format("; this upstream closes after {} ms ({} closes, spread {} ms)", timeout_->ms,
                                     timeout_->samples, timeout_->spread_ms());
            moments_.push_back({.ms = static_cast<double>(-std::int64_t{c_.idle_ms}), // no negative zero
                                .rest = true,
                                .way = Way::none,
                                .left = Left::unknown,
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
        add(c_.request_ns, Way::to_peer, "request", std::move(size));
    }

    void tell_response()
    {
        const std::uint64_t end_ns = has(c_, CONNECTION_PEER_FIN) ? c_.peer_fin_ns : c_.peer_reset_ns;
        if (e_.response_bytes == 0 || end_ns == 0)
            return;
        const std::uint64_t last_ns = end_ns - std::uint64_t{c_.fin_idle_ms} * 1'000'000;
        add(last_ns, Way::to_local, "response", fmt::format("{}, then silence", bytes_text(e_.response_bytes)));
    }

    void tell_fin()
    {
        if (!has(c_, CONNECTION_PEER_FIN))
            return;
        std::string shows;
        Left left = Left::unknown;
        if (c_.exchange > 0 && !has(c_, CONNECTION_SENT_AFTER_FIN | CONNECTION_LOCAL_FIRST) && request_bytes_ > 0) {
            shows = acknowledged_text(c_.fin_unacked, request_bytes_);
            left = left_by(c_.fin_unacked);
            if (c_.fin_unacked >= request_bytes_)
                shows += ": sent before the request arrived";
            else if (c_.fin_unacked == 0 && e_.response_bytes == 0)
                shows += ", answers none";
        }
        add(c_.peer_fin_ns, Way::to_local, "FIN", std::move(shows), left);
    }

    /// A segment that leaves so much of the request unacknowledged.
    [[nodiscard]] Left left_by(std::uint32_t unacked) const
    {
        return unacked < request_bytes_ ? Left::after_request : Left::before_request;
    }

    void tell_reset()
    {
        if (!has(c_, CONNECTION_PEER_RESET))
            return;
        std::string shows;
        Left left = Left::after_request;
        if (opening_) {
            shows = "refuses the SYN";
        } else if (has(c_, CONNECTION_RESET_FLAGS_UNKNOWN) || (e_.observed & OBSERVED_RESET_HEADER) == 0) {
            shows = "its header could not be seen";
            left = Left::unknown;
        } else if (has(c_, CONNECTION_RESET_HAS_ACK)) {
            left = request_bytes_ > 0 ? left_by(c_.reset_unacked) : Left::unknown;
            shows = request_bytes_ > 0
                        ? acknowledged_text(c_.reset_unacked, request_bytes_) + ": the upstream's socket still existed"
                        : "with ACK: the upstream's socket still existed";
        } else if (has(c_, CONNECTION_RESET_AT_FIN)) {
            shows = "its number is the FIN's: answers what was sent before the FIN came";
        } else if (has(c_, CONNECTION_RESET_BEYOND_FIN)) {
            shows = "its number follows the FIN's: answers what was sent after it";
        } else {
            shows = "without ACK: the upstream's socket was gone";
        }
        add(c_.peer_reset_ns, Way::to_local, "RST", std::move(shows), left);
    }

    void tell_local_close()
    {
        if (kernel_gave_up(e_))
            add(e_.timestamp_ns, Way::none, "gave up",
                e_.socket_error != 0 ? error_name(e_.socket_error) : std::string());
        else if (has(c_, CONNECTION_LOCAL_FIN))
            add(c_.local_close_ns, Way::to_peer, "FIN", "this host closes");
        else if (has(c_, CONNECTION_LOCAL_RESET))
            add(c_.local_close_ns, Way::to_peer, "RST", "this host resets");
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

} // namespace

std::vector<Moment> moments_of(const Sighting& sighting)
{
    if (sighting.verdict.cause == Cause::upstream_benched) // its story has been told before
        return {};
    return Story(sighting).take();
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
                            !has(c, CONNECTION_ADOPTED)         ? ""
                            : (e.observed & OBSERVED_WIRE) != 0 ? " since the capture began"
                                                                : " since finrace started");
    return line;
}

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

} // namespace finrace
