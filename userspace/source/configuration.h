// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Reads what proxies and servers are told: from their configuration files and command lines, which setting of an idle
// timeout holds for an upstream, with its file and line. No more of these languages than that takes. What is not
// understood is passed over: a setting that is not found is not known.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/software.h"
#include "core/upstream.h"

namespace finrace {

/// A process, as far as its command line and environment tell what it has been told.
struct ProcessFacts {
    std::uint32_t pid = 0;
    std::string name;                               ///< comm
    std::vector<std::string> arguments;             ///< from the program's own name on
    std::map<std::string, std::string> environment; ///< those variables that may decide
    std::string directory;                          ///< its working directory
    std::int64_t started_s = 0;                     ///< CLOCK_REALTIME
};

/// The variables of ProcessFacts::environment.
std::vector<std::string_view> deciding_variables();

struct ConfigurationFile {
    std::string path;
    std::string text;
    std::int64_t modified_s = 0; ///< CLOCK_REALTIME
};

/// The files that a path stands for, which may end in a pattern (fnmatch(3)) or be a directory, sorted by name: as
/// their reader sees them. None if there are none.
using OpenFiles = std::function<std::vector<ConfigurationFile>(const std::string& path)>;

/// What holds for connections to `upstream`, at the proxy's end. Empty if it is not known.
std::vector<Present> present_of_proxy(const IdleSetting& software, const ProcessFacts& process,
                                      const UpstreamKey& upstream, const OpenFiles& open_files);

/// What holds for connections that a server has accepted. Empty if it is not known.
std::vector<Present> present_of_server(const IdleSetting& software, const ProcessFacts& process,
                                       const OpenFiles& open_files);

/// The flag of its command line after how many requests a process of the server ends, with its value and its place.
/// Empty if there is none.
std::string recycling_of_server(const IdleSetting& software, const ProcessFacts& process);

/// After how long a server kills a worker for one request. Empty if it is not known, or not of its kind.
std::vector<Present> worker_limit_of_server(const IdleSetting& software, const ProcessFacts& process,
                                            const OpenFiles& open_files);

} // namespace finrace
