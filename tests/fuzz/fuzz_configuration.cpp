// SPDX-License-Identifier: GPL-2.0-only OR MIT
// libFuzzer: files and command lines that anybody on the host may have written, through the readers that run as root.
// The first byte chooses the reader; the rest is a command line, an empty line, and the files, parted by a byte 1. 255
// chooses finrace's own: the rest is its file.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

#include "cli/config_file.h"
#include "cli/options.h"
#include "source/configuration.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

/// For speed: the readers have a bound of their own.
constexpr unsigned most_opened = 50;
constexpr std::uint8_t own_file = 255;

std::vector<std::string> split(std::string_view text, char at)
{
    std::vector<std::string> parts;
    while (!text.empty()) {
        const std::size_t end = std::min(text.find(at), text.size());
        parts.emplace_back(text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return parts;
}

/// What is wrong has a place, always.
void read_own(std::string_view text)
{
    using namespace finrace;
    Action action;
    CLI::App program("finrace");
    add_run(program, action);
    try {
        take_config_text(*program.get_subcommand("run"), "f", text);
    } catch (const UsageError& error) {
        if (!std::string_view(error.what()).starts_with("f:"))
            std::abort();
    }
}

} // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    using namespace finrace;
    if (size == 0)
        return 0;
    const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
    if (data[0] == own_file) {
        read_own(text);
        return 0;
    }
    const std::size_t head = std::min(text.find("\n\n"), text.size());
    ProcessFacts process{.pid = 1,
                         .name = {},
                         .arguments = split(text.substr(0, head), ' '),
                         .environment = {},
                         .directory = "/srv",
                         .started_s = 0};
    for (const std::string_view variable : deciding_variables())
        if (!process.arguments.empty())
            process.environment[std::string(variable)] = process.arguments.back();
    const std::vector<std::string> files = split(text.substr(head), '\1');
    // Each name finds one of them, the same one each time: includes may go round.
    unsigned opened = 0;
    const OpenFiles open_files = [&](const std::string& path) -> std::vector<ConfigurationFile> {
        if (files.empty() || ++opened > most_opened)
            return {};
        return {{.path = path, .text = files[path.size() % files.size()], .modified_s = 0}};
    };
    UpstreamKey upstream{.address = {10, 0, 0, 5}, .port = 8000, .family = 4, .netns = 0};
    const auto proxies = proxy_settings();
    const auto servers = server_settings();
    const std::size_t chosen = data[0] % (proxies.size() + servers.size());
    const bool is_proxy = chosen < proxies.size();
    const IdleSetting& software = is_proxy ? proxies[chosen] : servers[chosen - proxies.size()];
    process.name = software.processes.front();
    for (const Present& present : is_proxy ? present_of_proxy(software, process, upstream, open_files)
                                           : present_of_server(software, process, open_files))
        if (present.place.empty() || present.text.find('\n') != std::string::npos)
            std::abort();
    setting_of_server({}, process.arguments);
    return 0;
}
