// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace doctor: what this kernel allows, tried out rather than guessed: every backend is loaded, attached and
// detached again. It says beforehand what run and watch would say.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <sys/utsname.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "cli/options.h"
#include "cli/privileges.h"
#include "cli/terminal.h"
#include "core/cause.h"
#include "sink/text.h"
#include "source/container.h"
#include "source/live.h"

namespace finrace {

namespace {

using Json = nlohmann::ordered_json;

/// Empty where there is none.
std::string find_cgroup_root()
{
    try {
        return cgroup_root();
    } catch (const SetupError&) {
        return {};
    }
}

struct Findings {
    std::string kernel;
    std::string machine;
    bool btf = false;
    std::string lockdown;
    std::vector<std::string> missing_capabilities;
    std::optional<std::string> refusal;
    bool host_processes = false;
    std::string cgroup_root;
    std::vector<BackendReport> backends;

    /// What --backend auto takes; nullptr if nothing works.
    [[nodiscard]] const BackendReport* choice() const
    {
        const auto found =
            std::find_if(backends.begin(), backends.end(), [](const BackendReport& report) { return report.works; });
        return found == backends.end() ? nullptr : &*found;
    }
};

std::string full_name(const BackendReport& report)
{
    return report.attach.empty() ? report.backend : report.backend + " by " + report.attach;
}

Findings examine()
{
    utsname kernel{};
    ::uname(&kernel);
    const std::string lockdown = lockdown_mode();
    Findings findings{
        .kernel = kernel.release,
        .machine = kernel.machine,
        .btf = ::access("/sys/kernel/btf/vmlinux", R_OK) == 0,
        .lockdown = lockdown.empty() ? "unknown (securityfs does not tell)" : lockdown,
        .missing_capabilities = missing_capabilities(effective_capabilities()),
        .refusal = refusal(),
        .host_processes = sees_host_processes(),
        .cgroup_root = find_cgroup_root(),
        .backends = {},
    };
    // Every attempt would fail with EPERM, which says nothing of the kernel.
    if (!findings.refusal)
        findings.backends = examine_backends();
    return findings;
}

/// The causes that need what this backend does not see.
std::vector<std::string_view> never_named(const BackendReport& report)
{
    std::vector<std::string_view> causes;
    if (report.works && report.backend == "cgroup")
        for (const CauseText& text : cause_texts())
            if (text.by_trace_alone)
                causes.push_back(to_string(text.cause));
    return causes;
}

void print(const Findings& findings)
{
    const Paint paint(shows_colours(stdout));
    const auto fact = [&](std::string_view name, const std::string& text, bool good) {
        fmt::print("  {:<14}{}\n", name, good ? text : paint.yellow(text));
    };
    fmt::print("{}\n", paint.bold("This host"));
    fact("kernel", fmt::format("{} ({})", findings.kernel, findings.machine), true);
    fact("BTF", findings.btf ? "/sys/kernel/btf/vmlinux" : "no /sys/kernel/btf/vmlinux: backend trace needs it",
         findings.btf);
    fact("lockdown",
         findings.lockdown == "confidentiality" ? "confidentiality: backend trace is refused" : findings.lockdown,
         findings.lockdown != "confidentiality");
    fact("cgroup v2",
         findings.cgroup_root.empty() ? "no cgroup2 with its root in /proc/self/mountinfo: backend cgroup needs it; "
                                        "mount -t cgroup2 none /sys/fs/cgroup/unified, in a container the host's"
                                      : findings.cgroup_root,
         !findings.cgroup_root.empty());
    fact("capabilities",
         findings.missing_capabilities.empty()
             ? "all that is needed"
             : fmt::format("{} missing", fmt::join(findings.missing_capabilities, ", ")),
         findings.missing_capabilities.empty());
    fact("processes", findings.host_processes ? "by the host's numbers" : "by a container's own numbers",
         findings.host_processes);

    for (const BackendReport& report : findings.backends) {
        fmt::print("\n{}  {}\n", paint.bold(full_name(report)),
                   report.works ? paint.green("works") : paint.red("does not work"));
        if (!report.problem.empty())
            for (const std::string& line : wrap(report.problem, std::min<std::size_t>(terminal_width(), 120) - 2))
                fmt::print("  {}\n", line);
        std::size_t longest = 0;
        for (const Hook& hook : report.hooks)
            longest = std::max(longest, hook.name.size());
        for (const Hook& hook : report.hooks) {
            fmt::print("  {} {:<{}}  {}\n",
                       hook.attached ? paint.green("yes") : (hook.required ? paint.red("no ") : paint.yellow("no ")),
                       hook.name, longest, hook.purpose);
            if (!hook.attached && !hook.problem.empty())
                fmt::print("      {}\n", paint.dim(hook.problem));
        }
        for (const std::string& what : report.unseen)
            fmt::print("  {} {}\n", paint.yellow("not seen:"), what);
        for (const std::string& what : report.warnings)
            fmt::print("  {} {}\n", paint.yellow("warning:"), what);
        if (const auto causes = never_named(report); !causes.empty())
            fmt::print("  {} {}\n", paint.yellow("never named:"), fmt::join(causes, ", "));
    }
    const BackendReport* choice = findings.choice();
    fmt::print("\n{}\n", choice != nullptr
                             ? paint.bold(fmt::format("--backend auto takes {}.", full_name(*choice)))
                             : paint.red(findings.refusal ? "No backend was tried: " + *findings.refusal + "."
                                                          : "No backend works here."));
}

Json to_json(const Findings& findings)
{
    Json json{
        {"version", FINRACE_VERSION},    {"kernel", findings.kernel},
        {"machine", findings.machine},   {"btf", findings.btf},
        {"lockdown", findings.lockdown}, {"missing_capabilities", findings.missing_capabilities},
    };
    if (findings.refusal)
        json["refusal"] = *findings.refusal;
    json["host_processes"] = findings.host_processes;
    if (!findings.cgroup_root.empty())
        json["cgroup_root"] = findings.cgroup_root;
    Json& backends = json["backends"] = Json::array();
    for (const BackendReport& report : findings.backends) {
        Json one{{"backend", report.backend}};
        if (!report.attach.empty())
            one["attach"] = report.attach;
        one["works"] = report.works;
        if (!report.problem.empty())
            one["problem"] = report.problem;
        Json& hooks = one["hooks"] = Json::array();
        for (const Hook& hook : report.hooks) {
            Json entry{{"name", hook.name},
                       {"attached", hook.attached},
                       {"required", hook.required},
                       {"purpose", hook.purpose}};
            if (!hook.problem.empty())
                entry["problem"] = hook.problem;
            hooks.push_back(std::move(entry));
        }
        if (!report.unseen.empty())
            one["unseen"] = report.unseen;
        if (!report.warnings.empty())
            one["warnings"] = report.warnings;
        if (const auto causes = never_named(report); !causes.empty())
            one["never_named"] = causes;
        backends.push_back(std::move(one));
    }
    if (const BackendReport* choice = findings.choice()) {
        json["choice"]["backend"] = choice->backend;
        if (!choice->attach.empty())
            json["choice"]["attach"] = choice->attach;
    }
    return json;
}

int doctor(bool json)
{
    const Findings findings = examine();
    if (json)
        fmt::print("{}\n", to_json(findings).dump(2, ' ', false, Json::error_handler_t::replace));
    else
        print(findings);
    return findings.choice() != nullptr ? exit_success : exit_unusable;
}

} // namespace

void add_doctor(CLI::App& program, Action& action)
{
    CLI::App* command =
        program.add_subcommand("doctor", "what this kernel allows, what would attach, what would be missed");
    auto json = std::make_shared<bool>(false);
    command->add_flag("--json", *json, "the same as one JSON object");
    command->footer("Ends with 0 if some backend works, else with 2.\n"
                    "\n"
                    "Examples:\n"
                    "  finrace doctor\n"
                    "  finrace doctor --json | jq .choice");
    command->callback([json, &action] { action = [json] { return doctor(*json); }; });
}

} // namespace finrace
