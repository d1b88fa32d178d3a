// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace: names why a proxied request died. This file only finds the command and turns what went wrong into
// words and an exit status.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/options.h"
#include "cli/parse.h"
#include "sink/stream.h"
#include "source/input.h"
#include "source/live.h"
#include "source/recording.h"

namespace {

/// Standard output is buffered: only now does a full disk show.
int written_out(int status)
{
    if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0)
        return status;
    finrace::say(fmt::format("cannot write to standard output: {}", std::strerror(errno)));
    return finrace::exit_unusable;
}

/// What is opened later must not take a standard stream's number that whoever started this left closed: what is said
/// would go there.
void hold_standard_descriptors()
{
    int fd = 0;
    while (fd >= 0 && fd <= STDERR_FILENO)
        fd = ::open("/dev/null", O_RDWR);
    if (fd > STDERR_FILENO)
        ::close(fd);
}

/// CLI11's own words, but for "--for excludes file".
std::string in_words(const CLI::ParseError& error)
{
    constexpr std::string_view excludes = " excludes ";
    std::string text = error.what();
    if (const std::size_t at = text.find(excludes); at != std::string::npos && error.get_name() == "ExcludesError")
        text.replace(at, excludes.size(), " can't stand together with ");
    return text;
}

/// Whether the next start would meet it as well, unless somebody does something about it.
bool is_for_the_user(const std::exception& error)
{
    using namespace finrace;
    const auto lasts = [](int number) {
        constexpr std::array passing{ENOMEM, EAGAIN, ENOSPC, EDQUOT, ENFILE};
        return std::find(passing.begin(), passing.end(), number) == passing.end();
    };
    if (const auto* of_output = dynamic_cast<const OutputError*>(&error))
        return lasts(of_output->error);
    if (const auto* of_setup = dynamic_cast<const SetupError*>(&error))
        return lasts(of_setup->error);
    return dynamic_cast<const UsageError*>(&error) != nullptr || dynamic_cast<const InputError*>(&error) != nullptr ||
           dynamic_cast<const RecordingError*>(&error) != nullptr;
}

} // namespace

int main(int argc, char** argv)
{
    using namespace finrace;
    hold_standard_descriptors();

    CLI::App program(
        "Watches TCP in the kernel and names why a proxied request died: above all the keep-alive race, in "
        "which a request and the upstream's idle close cross on the wire.",
        "finrace");
    program.set_version_flag("--version", "finrace " FINRACE_VERSION);
    program.require_subcommand(1);
    program.footer("Examples:\n"
                   "  finrace doctor                        what this kernel allows\n"
                   "  finrace diagnose --for 60s            what is wrong, and which setting to change\n"
                   "  finrace watch                         each race as a timeline, live\n"
                   "  finrace run --output finrace.jsonl    the daemon\n"
                   "  finrace explain keepalive_race        a cause, its evidence and its remedy");
    format_help(program);
    Action action;
    add_run(program, action);
    add_watch(program, action);
    add_diagnose(program, action);
    add_record(program, action);
    add_doctor(program, action);
    add_explain(program, action);
    add_manual(program, action);
    add_completion(program, action);
    add_help(program, action);

    try {
        program.parse(argc, argv);
    } catch (const CLI::Success& asked) { // --help, --version
        return written_out(program.exit(asked));
    } catch (const CLI::ParseError& error) {
        const auto chosen = program.get_subcommands();
        if (chosen.empty() && argc > 1 && argv[1][0] != '-')
            say(fmt::format("'{}' is no command; known are: {}", argv[1], fmt::join(command_names(program), ", ")));
        else
            say(in_words(error));
        say(fmt::format("see finrace {}--help", chosen.empty() ? "" : chosen.front()->get_name() + " "));
        return exit_unusable;
    }
    try {
        return written_out(action());
    } catch (const std::bad_alloc&) {
        say("out of memory");
        return exit_failed;
    } catch (const std::exception& error) {
        say(error.what());
        return is_for_the_user(error) ? exit_unusable : exit_failed;
    }
}
