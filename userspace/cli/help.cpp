// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace help, and how --help lays out options: each by its name and its value's, as the man pages do. Which flags
// can't stand together is said when they do.
#include <memory>
#include <string>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/options.h"

namespace finrace {

namespace {

class HelpFormatter final : public CLI::Formatter {
public:
    std::string make_option_name(const CLI::Option* option, bool is_positional) const override
    {
        return is_positional ? option->get_type_name() : CLI::Formatter::make_option_name(option, is_positional);
    }
    std::string make_option_opts(const CLI::Option* option) const override
    {
        return option->get_positional() || option->get_type_size() == 0 ? "" : " " + option->get_type_name();
    }
    std::string make_option_usage(const CLI::Option* option) const override
    {
        return option->get_required() ? option->get_type_name() : fmt::format("[{}]", option->get_type_name());
    }
};

int help(const CLI::App& program, const std::string& wanted)
{
    if (wanted.empty()) {
        fmt::print("{}", program.get_formatter()->make_help(&program, program.get_name(), CLI::AppFormatMode::Normal));
        return exit_success;
    }
    if (const CLI::App* command = command_named(program, wanted)) {
        fmt::print("{}", command->help(program.get_name()));
        return exit_success;
    }
    throw UsageError(fmt::format("'{}' is no command; known are: {}", wanted, fmt::join(command_names(program), ", ")));
}

} // namespace

void format_help(CLI::App& program)
{
    program.formatter(std::make_shared<HelpFormatter>());
}

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
