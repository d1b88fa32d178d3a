// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Where a capture was taken: what a source finds out, and a report says.
#pragma once

namespace finrace {

enum class TakenAt {
    unknown,
    client,  ///< at the end of the host that opened the connections: a proxy's, for its upstreams
    server,  ///< at the end of the host that accepted them: the upstream
    both,    ///< both ends of all are on the host that captured
    between, ///< on the way
    mixed,   ///< at the one end of some connections and at the other of others: a proxy's, with its clients'
};

} // namespace finrace
