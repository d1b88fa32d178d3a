// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A record as the host's own logs take it: a syslog message (RFC 5424), or an entry of systemd's journal with a field
// for each of the record's values.
#pragma once

#include <string>

#include <sys/types.h>

#include "sink/json.h"

namespace finrace {

/// RFC 5424, section 6: facility daemon, the record's kind as MSGID, `shown` (the record itself, or on one level)
/// as the message, in ASCII alone. `pid`: of whoever says so.
std::string syslog_message(const Json& record, const Json& shown, pid_t pid);

/// systemd's native journal protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL): a sentence as MESSAGE, and all
/// values under their flattened names in capitals: finrace.connection.idle_ms is FINRACE_CONNECTION_IDLE_MS.
std::string journal_entry(const Json& record);

/// The record in a sentence, for people.
std::string sentence_of(const Json& record);

} // namespace finrace
