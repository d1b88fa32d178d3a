// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Which software stands at an end of a pool, and which of its settings decides when an idle connection is closed. One
// table, each row with its default and where that stands.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace finrace {

enum class Unit { seconds, milliseconds };

/// Where the present value of a setting is to be read.
enum class Configuration {
    unreadable, ///< in the application's own code, or by rules that finrace does not know
    command_line,
    gunicorn, ///< command line, and a file in Python
    nginx,
    haproxy,
    apache,
};

/// One software's setting, at one end of a pool.
struct IdleSetting {
    std::string_view software{};
    std::array<std::string_view, 3> processes{}; ///< its names as the kernel has them (comm), or how these begin
    std::string_view word{};                     ///< in the command line of an interpreter that runs it; may be empty
    std::string_view setting{};                  ///< with {} for the value; empty if there is none
    std::string_view beside{};                   ///< what has to be set as well, as it is written; may be empty
    std::string_view beside_where{};
    std::string_view where{}; ///< in which file or block, or what to do where there is no setting
    Unit unit = Unit::seconds;
    std::uint32_t default_ms = 0; ///< 0: no limit, or none that is known
    Configuration configuration = Configuration::unreadable;
    std::string_view flag{};       ///< on the command line
    std::string_view variable{};   ///< of the environment, with the flag's value
    bool looked_at_on_use = false; ///< a connection that has rested for longer is closed only instead of being used
    std::string_view source{};     ///< of the name and the default
    std::string_view recycling{};  ///< of a server: the flag after how many requests a process of it ends; may be empty
    std::string_view dies_of{};    ///< of a server: what makes it close a request without an answer; may be empty
    std::string_view dies_of_source{};
};

/// gunicorn's limit of a worker's silence: docs.gunicorn.org, settings: timeout; arbiter.py, murder_workers().
constexpr std::string_view worker_limit_flag = "--timeout";
constexpr std::string_view worker_limit_short_flag = "-t";
constexpr std::string_view worker_limit_name = "timeout";
constexpr std::uint32_t worker_limit_default_ms = 30'000;
/// Its arbiter looks once a second, and gives a worker one more to end by itself.
constexpr std::uint32_t worker_limit_late_ms = 2000;

std::span<const IdleSetting> proxy_settings();
/// Of servers; the first `most_common` ones are named where it is not known which one it is.
std::span<const IdleSetting> server_settings();
constexpr std::size_t most_common_servers = 3;

/// By the process that owns the connections; nullptr if it is none of those.
const IdleSetting* setting_of_proxy(std::string_view process);
/// By the process that listens there, and its command line.
const IdleSetting* setting_of_server(std::string_view process, const std::vector<std::string>& arguments);

/// The setting with a value, as it is to be written.
std::string written(const IdleSetting& setting, std::uint32_t value_ms);

/// What is set at present.
struct Present {
    std::uint32_t ms = 0; ///< 0: no limit
    std::string text;     ///< as it stands there; empty where the default holds because nothing does
    std::string place;    ///< "/etc/nginx/nginx.conf:12", or which command line
    bool pending = false; ///< its file is newer than the process: not in force yet, perhaps

    auto operator<=>(const Present&) const = default; // NOLINT(modernize-use-nullptr): the 0 is the compiler's own
};

/// What is known of one end of a pool, besides what its connections show.
struct End {
    const IdleSetting* software = nullptr; ///< nullptr: not known
    std::uint32_t pid = 0;                 ///< of the process that tells; 0 if none was found
    std::vector<Present> present;          ///< each place that may decide; empty if not known
    std::optional<bool> listens{};         ///< whether anybody does now, at the upstream's end; nothing if not known
    std::string recycling{};               ///< after how many requests a process of it ends, and where that is told
    std::vector<Present> worker_limit{};   ///< after how long it kills a silent worker; empty if not known

    /// After how long it closes an idle connection at the latest, by what it has been told; 0: never. Nothing if that
    /// is not known.
    [[nodiscard]] std::optional<std::uint32_t> limit_ms() const;
};

struct Ends {
    End proxy;    ///< whoever owns the connections here
    End upstream; ///< whoever listens there, on this host
};

} // namespace finrace
