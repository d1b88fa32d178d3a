// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace manual and finrace completion: man pages, and what shells complete, made of the same descriptions that --help
// and explain print. There is no second text to keep true.
#include <algorithm>
#include <cctype>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/options.h"
#include "core/cause.h"
#include "core/reason.h"
#include "sink/sentences.h"

namespace finrace {

namespace {

constexpr std::string_view causes_page = "finrace-causes";

std::vector<const CLI::Option*> options_of(const CLI::App& command, bool positional)
{
    std::vector<const CLI::Option*> options =
        command.get_options([positional](const CLI::Option* option) { return option->get_positional() == positional; });
    return options;
}

bool takes_value(const CLI::Option& option)
{
    return option.get_items_expected_max() > 0;
}

// ---- man pages: man(7), as groff reads them

std::string roff(std::string_view text)
{
    std::string escaped;
    for (const char c : text) {
        if (c == '\\')
            escaped += "\\e";
        else if (c == '-')
            escaped += "\\-";
        else
            escaped += c;
    }
    return escaped;
}

/// Lines that begin no request, whatever they begin with.
std::string roff_lines(std::string_view text)
{
    std::string lines;
    while (!text.empty()) {
        const std::size_t end = std::min(text.find('\n'), text.size());
        lines += fmt::format("\\&{}\n", roff(text.substr(0, end)));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return lines;
}

std::string heading(std::string_view name, unsigned section)
{
    return fmt::format(".TH {} {} \"\" \"finrace " FINRACE_VERSION "\"\n.nh\n.ad l\n", roff(name), section);
}

/// What a help text ends with: remarks, then examples.
std::string roff_footer(const std::string& footer)
{
    constexpr std::string_view label = "Examples:\n";
    const std::size_t examples = footer.find(label);
    std::string text;
    if (const std::string remarks = footer.substr(0, examples); !remarks.empty())
        text += ".SH NOTES\n" + roff_lines(remarks);
    if (examples != std::string::npos)
        text += ".SH EXAMPLES\n.nf\n" + roff_lines(footer.substr(examples + label.size())) + ".fi\n";
    return text;
}

std::string roff_option(const CLI::Option& option, bool positional)
{
    const std::string type = option.get_type_name();
    const std::string name = positional ? type : option.get_name(false, true);
    return fmt::format(".TP\n\\fB{}\\fR{}\n{}", roff(name),
                       !positional && takes_value(option) ? " \\fI" + roff(type) + "\\fR" : std::string(),
                       roff_lines(option.get_description()));
}

std::string page_of(const CLI::App& program, const CLI::App* command)
{
    const CLI::App& subject = command != nullptr ? *command : program;
    const std::string name = command != nullptr ? "finrace-" + command->get_name() : "finrace";
    const std::string description = subject.get_description();
    std::string text = heading(name, 8);
    text +=
        fmt::format(".SH NAME\n{} \\- {}", roff(name),
                    command != nullptr ? roff(description) + "\n" : roff("names why a proxied request died") + "\n");
    text += fmt::format(".SH SYNOPSIS\n\\fBfinrace{}\\fR", command != nullptr ? " " + command->get_name() : "");
    if (command == nullptr)
        text += " \\fICOMMAND\\fR";
    text += " [\\fIOPTION\\fR...]";
    for (const CLI::Option* option : options_of(subject, true))
        text += fmt::format(" [\\fI{}\\fR]", roff(option->get_type_name()));
    text += "\n.SH DESCRIPTION\n" + roff_lines(description);
    if (command == nullptr) {
        text += ".SH COMMANDS\n";
        for (const CLI::App* one : commands_of(program))
            text += fmt::format(".TP\n\\fB{}\\fR\n{}", roff(one->get_name()), roff_lines(one->get_description()));
    }
    text += ".SH OPTIONS\n";
    for (const bool positional : {true, false})
        for (const CLI::Option* option : options_of(subject, positional))
            text += roff_option(*option, positional);
    text += roff_footer(subject.get_footer());
    text += ".SH SEE ALSO\n";
    std::vector<std::string> others;
    if (command != nullptr)
        others.emplace_back("\\fBfinrace\\fR(8)");
    for (const CLI::App* one : commands_of(program))
        if (one != command)
            others.push_back(fmt::format("\\fBfinrace\\-{}\\fR(8)", roff(one->get_name())));
    others.push_back(fmt::format("\\fB{}\\fR(7)", roff(causes_page)));
    return text + fmt::format("{}\n", fmt::join(others, ",\n"));
}

std::string page_of_causes()
{
    std::string text = heading(causes_page, 7);
    text += fmt::format(".SH NAME\n{} \\- why a proxied request died, by finrace's names\n", roff(causes_page));
    text +=
        ".SH DESCRIPTION\n" +
        roff_lines("What finrace.cause says in records and reports: what happened, what shows it, what proxies say, "
                   "and what to look at. finrace explain prints the same.");
    for (const CauseText& cause : cause_texts()) {
        text += fmt::format(".SH {}\n", roff(to_string(cause.cause)));
        text += fmt::format("\\fB{}\\fR\n", roff(cause.title));
        for (const auto& [head, body] :
             {std::pair("What happened", cause.happened), std::pair("What shows it", cause.evidence),
              std::pair("What proxies say", cause.proxy_says), std::pair("What to look at", cause.remedy)})
            text += fmt::format(".TP\n{}\n{}", head, roff_lines(body));
    }
    text += ".SH REASONS\n" + roff_lines("What finrace.reason says of a race: why the upstream closed the connection.");
    for (const ReasonText& reason : reason_texts())
        text += fmt::format(".TP\n\\fB{}\\fR\n{}", roff(to_string(reason.reason)),
                            roff_lines(fmt::format("{}. {} {}", reason.title, reason.evidence, reason.remedy)));
    text += ".SH OTHER WORDS\n";
    for (const Word& word : report_words())
        text += fmt::format(".TP\n\\fB{}\\fR\n{}", roff(word.word), roff_lines(word.meaning));
    return text + ".SH SEE ALSO\n\\fBfinrace\\-explain\\fR(8)\n";
}

int manual(const CLI::App& program, const std::string& wanted)
{
    const std::string_view name = wanted.starts_with("finrace-") ? std::string_view(wanted).substr(8) : wanted;
    if (name == "finrace" || name.empty()) {
        fmt::print("{}", page_of(program, nullptr));
        return exit_success;
    }
    if (name == "causes") {
        fmt::print("{}", page_of_causes());
        return exit_success;
    }
    if (const CLI::App* command = command_named(program, name)) {
        fmt::print("{}", page_of(program, command));
        return exit_success;
    }
    throw UsageError(fmt::format("'{}' is no page; known are: finrace, {}, causes", wanted,
                                 fmt::join(command_names(program), ", ")));
}

// ---- completion

/// What may stand where a value is expected.
struct Values {
    bool files = false;
    std::vector<std::string> words{};
};

/// By the type that help shows: "auto|trace|cgroup" are words, "NAME|PID" is not.
Values values_of(const CLI::App& program, const CLI::Option& option)
{
    const std::string type = option.get_type_name();
    Values values;
    if (type.starts_with("FILE")) {
        values.files = true;
    } else if (type == "CAUSE") {
        for (const CauseText& cause : cause_texts())
            values.words.emplace_back(to_string(cause.cause));
        for (const ReasonText& reason : reason_texts())
            values.words.emplace_back(to_string(reason.reason));
        for (const Word& word : report_words())
            values.words.emplace_back(word.word);
    } else if (type == "COMMAND" || type == "PAGE") {
        values.words = command_names(program);
        if (type == "PAGE")
            values.words.emplace_back("causes");
    } else if (type.find('|') != std::string::npos && std::all_of(type.begin(), type.end(), [](unsigned char c) {
                   return c == '|' || std::islower(c) != 0;
               })) {
        std::string_view rest = type;
        while (!rest.empty()) {
            const std::size_t end = std::min(rest.find('|'), rest.size());
            values.words.emplace_back(rest.substr(0, end));
            rest.remove_prefix(std::min(end + 1, rest.size()));
        }
    }
    return values;
}

std::vector<std::string> flags_of(const CLI::App& command)
{
    std::vector<std::string> flags;
    for (const CLI::Option* option : options_of(command, false))
        for (const std::string& name : option->get_lnames())
            flags.push_back("--" + name);
    return flags;
}

/// Fit for single quotes, in each of the shells; brackets and colons mean something to zsh.
std::string quotable(std::string text)
{
    std::replace_if(
        text.begin(), text.end(),
        [](char c) { return c == '\'' || c == '[' || c == ']' || c == ':' || c == '\\' || c == '\n'; }, ' ');
    return text;
}

std::string bash_reply(const Values& values)
{
    if (values.files)
        return "COMPREPLY=($(compgen -f -- \"$current\"))";
    return fmt::format("COMPREPLY=($(compgen -W '{}' -- \"$current\"))", fmt::join(values.words, " "));
}

std::string bash(const CLI::App& program)
{
    std::string by_value;
    std::string by_command;
    for (const CLI::App* command : commands_of(program)) {
        const std::string& name = command->get_name();
        for (const CLI::Option* option : options_of(*command, false))
            if (takes_value(*option))
                for (const std::string& flag : option->get_lnames())
                    by_value += fmt::format("    {}:--{}) {}; return ;;\n", name, flag,
                                            bash_reply(values_of(program, *option)));
        const std::vector<const CLI::Option*> positional = options_of(*command, true);
        by_command +=
            fmt::format("    {})\n"
                        "        if [[ $current == -* ]]; then\n"
                        "            COMPREPLY=($(compgen -W '{}' -- \"$current\"))\n"
                        "        else\n"
                        "            {}\n"
                        "        fi\n"
                        "        ;;\n",
                        name, fmt::join(flags_of(*command), " "),
                        positional.empty() ? "COMPREPLY=()" : bash_reply(values_of(program, *positional.front())));
    }
    return fmt::format("# bash completion for finrace: finrace completion bash > /etc/bash_completion.d/finrace\n"
                       "_finrace() {{\n"
                       "    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}\n"
                       "    if ((COMP_CWORD == 1)); then\n"
                       "        COMPREPLY=($(compgen -W '{} {}' -- \"$current\"))\n"
                       "        return\n"
                       "    fi\n"
                       "    case ${{COMP_WORDS[1]}}:$before in\n{}    esac\n"
                       "    case ${{COMP_WORDS[1]}} in\n{}    esac\n"
                       "}}\n"
                       "complete -o filenames -F _finrace finrace\n",
                       fmt::join(command_names(program), " "), fmt::join(flags_of(program), " "), by_value, by_command);
}

std::string zsh_values(const Values& values)
{
    return values.files ? "_files" : fmt::format("({})", fmt::join(values.words, " "));
}

std::string zsh(const CLI::App& program)
{
    std::string described;
    std::string by_command;
    for (const CLI::App* command : commands_of(program)) {
        described += fmt::format("            '{}:{}'\n", command->get_name(), quotable(command->get_description()));
        by_command += fmt::format("        {}) _arguments", command->get_name());
        for (const CLI::Option* option : options_of(*command, false))
            for (const std::string& flag : option->get_lnames()) {
                by_command += fmt::format(" \\\n            '*--{}[{}]", flag, quotable(option->get_description()));
                if (takes_value(*option))
                    by_command += fmt::format(":{}:{}", quotable(option->get_type_name()),
                                              zsh_values(values_of(program, *option)));
                by_command += "'";
            }
        for (const CLI::Option* option : options_of(*command, true))
            by_command += fmt::format(" \\\n            '*:{}:{}'", quotable(option->get_type_name()),
                                      zsh_values(values_of(program, *option)));
        by_command += " ;;\n";
    }
    return fmt::format(
        "#compdef finrace\n"
        "# zsh completion for finrace: finrace completion zsh > /usr/share/zsh/vendor-completions/_finrace\n"
        "_finrace() {{\n"
        "    if ((CURRENT == 2)); then\n"
        "        local -a commands=(\n{}        )\n"
        "        _describe command commands\n"
        "        return\n"
        "    fi\n"
        "    local command=$words[2]\n"
        "    shift words\n"
        "    ((CURRENT--))\n"
        "    case $command in\n{}    esac\n"
        "}}\n"
        "compdef _finrace finrace\n",
        described, by_command);
}

std::string fish(const CLI::App& program)
{
    std::string text = "# fish completion for finrace: finrace completion fish > "
                       "/usr/share/fish/vendor_completions.d/finrace.fish\n"
                       "complete -c finrace -f\n";
    const auto values = [&program](const CLI::Option& option) -> std::string {
        const Values known = values_of(program, option);
        if (known.files)
            return " -F";
        return known.words.empty() ? std::string() : fmt::format(" -a '{}'", fmt::join(known.words, " "));
    };
    for (const CLI::App* command : commands_of(program)) {
        text += fmt::format("complete -c finrace -n __fish_use_subcommand -a {} -d '{}'\n", command->get_name(),
                            quotable(command->get_description()));
        const std::string within =
            fmt::format("complete -c finrace -n '__fish_seen_subcommand_from {}'", command->get_name());
        for (const CLI::Option* option : options_of(*command, false))
            for (const std::string& flag : option->get_lnames())
                text += fmt::format("{} -l {}{}{} -d '{}'\n", within, flag,
                                    !takes_value(*option)               ? ""
                                    : values_of(program, *option).files ? " -r"
                                                                        : " -x",
                                    takes_value(*option) ? values(*option) : "", quotable(option->get_description()));
        for (const CLI::Option* option : options_of(*command, true))
            text += fmt::format("{}{}\n", within, values(*option));
    }
    return text;
}

int completion(const CLI::App& program, const std::string& shell)
{
    if (shell == "bash")
        fmt::print("{}", bash(program));
    else if (shell == "zsh")
        fmt::print("{}", zsh(program));
    else if (shell == "fish")
        fmt::print("{}", fish(program));
    else
        throw UsageError(fmt::format("'{}' is no shell that finrace knows; accepted: bash, zsh, fish", shell));
    return exit_success;
}

} // namespace

void add_manual(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("manual", "a man page, of the program, a command or the causes");
    auto page = std::make_shared<std::string>();
    command->add_option("page", *page, "finrace, a command's name, or causes; finrace without one")->type_name("PAGE");
    command->footer("Examples:\n"
                    "  finrace manual diagnose | man -l -\n"
                    "  finrace manual causes > /usr/local/share/man/man7/finrace-causes.7");
    command->callback([page, &program, &action] { action = [page, &program] { return manual(program, *page); }; });
}

void add_completion(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("completion", "what a shell needs to complete finrace's commands");
    auto shell = std::make_shared<std::string>();
    command->add_option("shell", *shell, "which shell")->type_name("bash|zsh|fish")->required();
    command->footer("Examples:\n"
                    "  finrace completion bash > /etc/bash_completion.d/finrace\n"
                    "  source <(finrace completion bash)");
    command->callback(
        [shell, &program, &action] { action = [shell, &program] { return completion(program, *shell); }; });
}

} // namespace finrace
