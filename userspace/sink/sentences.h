// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A diagnosis in sentences. The terminal's report and the page lay out these, and so say the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/advice.h"
#include "core/diagnosis.h"
#include "core/vantage.h"
#include "sink/story.h"

namespace finrace {

constexpr std::size_t most_shown = 20; ///< findings, or upstreams, that people are told all about

/// A capture that was read, and what it does not have.
struct CaptureSeen {
    std::string file;
    TakenAt place = TakenAt::unknown; ///< seen from most of its connections
    bool sure = false;                ///< else likely
    std::string host{};               ///< address of the end that it was taken at; empty if not known
    std::uint64_t at_client = 0;      ///< connections that it was taken at the client's end of
    std::uint64_t at_server = 0;      ///< and at the other end of
    std::uint64_t segments = 0;       ///< of TCP
    std::uint64_t unreadable = 0;     ///< of them, without a header
    std::uint64_t missing = 0;        ///< acknowledged, and not captured
    std::uint64_t one_direction = 0;  ///< connections that were captured one way
    std::uint64_t guessed = 0;        ///< connections without a handshake
};

/// An upstream of connections that the filter did not let through.
struct Elsewhere {
    UpstreamKey where;
    std::string process;           ///< that opened the first of them; empty if not known
    std::uint64_t connections = 0; ///< that began, ended or rested meanwhile
};

/// Hosts whose records were read.
struct FleetSeen {
    std::vector<std::string> hosts{};  ///< that told anything
    std::vector<std::string> silent{}; ///< of these, that have stopped telling, and did not say that they would
    std::vector<std::string> ended{};  ///< and that did
    [[nodiscard]] bool all_tell() const { return silent.empty() && ended.empty(); }
};

/// What was looked at, besides what was found.
struct Watched {
    std::string host_name;
    std::string source; ///< for people: "backend trace by fentry"
    std::uint64_t observed_ns = 0;
    std::uint64_t lost = 0;             ///< events, connections, lines of a recording: what is missing, at least
    std::uint64_t table_full = 0;       ///< of these, connections that found no room
    std::uint64_t program_skipped = 0;  ///< and runs of a program that the kernel left out
    std::uint64_t adopted_open = 0;     ///< connections older than the tracer that have not ended
    std::vector<std::string> filter{};  ///< flags, as they were typed
    std::vector<Elsewhere> elsewhere{}; ///< the busiest first
    bool stored = false;                ///< in a file, to which nothing more comes
    bool chosen = false;                ///< some upstreams alone: such connections may lead elsewhere
    bool server_side_only = false;
    bool tells_outcomes = false;
    std::uint64_t missing_hooks = 0;
    std::uint64_t turned_away = 0; ///< connections, by listeners of this network namespace whose accept queue was full
    std::optional<FleetSeen> fleet{};    ///< many hosts' records, if these were read
    std::vector<CaptureSeen> captures{}; ///< what was read, if that is what was read

    /// Whether there is something of which nothing is known.
    [[nodiscard]] bool is_partial() const
    {
        return lost > 0 || missing_hooks > 0 || (adopted_open > 0 && !chosen) || (fleet && !fleet->all_tell());
    }
};

/// Upstreams' names. Two containers may have the same loopback address: then the network namespace tells them apart;
/// two hosts have, and then their names do.
class Places {
public:
    explicit Places(const Diagnosis& diagnosis);
    [[nodiscard]] std::string name(const UpstreamKey& key) const;

private:
    void note(const UpstreamKey& key);

    std::map<std::string, std::set<std::uint32_t>> networks_;
    std::map<UpstreamKey, std::string> hosts_; ///< one of a fleet's; of a loopback address there is no other
};

std::string counted(std::uint64_t count, std::string_view one); ///< "1 request", "2 requests"
std::string duration_text(std::uint64_t ms);                    ///< "981 ms", "5.00 s", "12 min"

// Of the whole.
/// Whether there was a filter, and no connection for it.
bool nothing_matched(const Diagnosis& diagnosis, const Watched& watched);
std::string subject_text(const Diagnosis& diagnosis, const Watched& watched); ///< what was looked at
std::string conclusion(const Diagnosis& diagnosis, const Watched& watched, const Places& places);
std::string lost_text(const Watched& watched); ///< empty if nothing was lost
/// What else limits what can be concluded.
std::vector<std::string> caveats(const Diagnosis& diagnosis, const Watched& watched);

/// A word that reports use, besides causes and reasons.
struct Word {
    std::string_view word;
    std::string_view meaning;
};
std::span<const Word> report_words();

/// What the words for certainty mean.
constexpr std::string_view certainties =
    "proven: the evidence excludes any other cause. likely: another one would need a "
    "coincidence. possible: another one fits nearly as well.";

// Of a finding.
std::string affected_text(const Finding& finding); ///< "12 requests died"
std::string why_text(const Finding& finding);      ///< the cause in words, how sure, and the upstream's reasons
std::string clients_text(const Finding& finding, const Watched& watched);
std::string
waits_text(const Finding& finding); ///< how long requests had waited for their end; empty if that tells nothing
/// Of a fleet: on which hosts, since when, and what the upstream's own host adds. Empty of one host.
std::string hosts_text(const Finding& finding);
std::string times_text(const Finding& finding); ///< in the local time zone: when, and which one is shown
/// Its most telling instance.
Sighting sighting_of(const Diagnosis& diagnosis, const Finding& finding);
/// What to look at besides an idle timeout's settings, a paragraph each.
std::vector<std::string> hints(const Diagnosis& diagnosis, const Watched& watched, const Finding& finding);
/// The pool whose timer a finding is about, and is known; or nullptr.
const Pool* pool_to_set(const Diagnosis& diagnosis, const Finding& finding);

// Of a pool; the first three if the upstream's timeout is known.
std::vector<Remedy> remedies_of(const Pool& pool);
std::string timeout_text(const Places& places, const Pool& pool); ///< when its upstream closes; no full stop
std::string limits_text(const Places& places, const Pool& pool);  ///< when its upstream closes, and what this host does
std::string name_text(const Places& places, const Pool& pool);
std::string traffic_text(const Pool& pool);                                 ///< "50 requests on 5 connections by nginx"
std::vector<std::string> pool_text(const Places& places, const Pool& pool); ///< paragraphs
std::string remedy_text(const Remedy& way, bool first); ///< what to do; its settings, if there are any, follow
std::string present_text(const Present& present);       ///< "now keepalive_timeout 60s;: /etc/nginx/nginx.conf:12"

} // namespace finrace
