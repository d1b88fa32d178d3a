// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace help: what --help says, for those who ask in another way.
#include <memory>
#include <string>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/options.h"

namespace finrace {

namespace {

int help(const CLI::App& program, const std::string& wanted)
{
    if (wanted.empty()) {
        fmt::print("{}", program.get_formatter()->make_help(&program, program.get_name(), CLI::AppFormatMode::Normal));
        return exit_success;
    }
    for (const CLI::App* command : commands_of(program)) {
        if (command->get_name() == wanted) {
            fmt::print("{}", command->help(program.get_name()));
            return exit_success;
        }
    }
    throw UsageError(fmt::format("'{}' is no command; known are: {}", wanted, fmt::join(command_names(program), ", ")));
}

} // namespace

void add_help(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("help", "what --help says, of the program or a command");
    auto wanted = std::make_shared<std::string>();
    command->add_option("command", *wanted, "a command's name; finrace without one")->type_name("COMMAND");
    command->footer("Examples:\n"
                    "  finrace help\n"
                    "  finrace help diagnose");
    command->callback([wanted, &program, &action] { action = [wanted, &program] { return help(program, *wanted); }; });
}

} // namespace finrace
