// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What went over the wire around a verdict, as data: the terminal's timeline and the page's sequence diagram are made
// of it, and so tell the same.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bpf/event.h"
#include "core/classify.h"
#include "core/outcome.h"

namespace finrace {

/// A verdict and what has been seen of its connection since.
struct Sighting {
    event judged; ///< the event that the verdict is about
    event last;   ///< the connection's last event so far
    Verdict verdict;
    Outcome outcome;
    std::optional<IdleTimeout> idle_timeout; ///< of its upstream
    std::string process_name;                ///< any bytes; empty if not known
};

/// One thing that this host saw, or did.
struct Moment {
    enum class Way { none, to_peer, to_local }; ///< a segment's, or no segment
    /// What a segment's sequence numbers prove about its leaving the peer.
    enum class Left { unknown, before_request, after_request }; ///< the request's arrival there

    double ms; ///< at this host, relative to the request, or to the SYN; at a server's end to its event
    bool rest; ///< begins here: then no finer than a millisecond is known
    Way way;
    Left left;
    std::string what;  ///< "FIN"
    std::string shows; ///< what it proves; may be empty
};

/// In the order in which this host saw them. None for what is told at another verdict.
std::vector<Moment> moments_of(const Sighting& sighting);

/// "nginx[1234]  10.0.0.1:41234 → 10.0.0.2:8000", and which request on this connection; the owner where it is known.
std::string whereabouts(const Sighting& sighting);

/// What became of the request, in sentences; empty if nothing is known.
std::string outcome_text(const Outcome& outcome);

} // namespace finrace
