// SPDX-License-Identifier: GPL-2.0-only OR MIT
// --config FILE: what a command's flags say, in a TOML file. A key is a flag's name with _ for -; the command line
// wins.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/command_line.h"

namespace finrace {

/// --config and --check-config.
struct ConfigFile {
    std::optional<std::string> path;
    bool only_checked = false;
};
void add_config_options(CLI::App& command, ConfigFile& config);

/// By key, the texts that each option has been given; none for one that has not.
using Settings = std::map<std::string, std::vector<std::string>>;
Settings settings_of(const CLI::App& command);
/// The same again, to a command with the same options.
void take_settings(CLI::App& command, const Settings& settings);

/// Where a file says what: for a flag, "FILE:LINE: key".
using KeyPlaces = std::map<std::string, std::string, std::less<>>;

/// Gives the command's options what the file (TOML 1.0.0) says, but for those that the command line has; returns where
/// it says so. Throws UsageError, which names file, line and key, and what is accepted.
KeyPlaces take_config(CLI::App& command, const std::string& path);
/// The same of a file's text.
KeyPlaces take_config_text(CLI::App& command, const std::string& path, std::string_view text);
/// What is wrong with flags together, as of keys: behind the place of the first flag in it that the file has given.
std::string located(const KeyPlaces& places, const std::string& text);

} // namespace finrace
